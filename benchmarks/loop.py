"""What a step of ours costs beside its products: the host's time, that of clip and update, and the log's."""

import io
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.common import Clock, Row, in_turns, seconds_of, settle
from benchmarks.contestants import OurStep, Silent
from megatron_aquila.observe.log import Log
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.train.report import RankZeroReporter, open_reporter

STEP_TOKENS = 2**18  # of the step that the update's share is given of
STEPS = 18  # that ``loop_costs`` takes
NEVER = 10**9  # steps from one line of the log to the next


@dataclass(slots=True)
class Drained:
    """A stage before and behind whose forward the device has done everything, so that no launch waits for another.

    ``waited``: the seconds in which the host did nothing else.
    """

    stage: Callable[[Tensor | None, Batch], Tensor]
    device: torch.device
    clock: Clock = time.perf_counter
    waited: float = field(default=0.0)

    def __call__(self, x: Tensor | None, batch: Batch) -> Tensor:
        """What the stage computes."""
        self.wait()
        y = self.stage(x, batch)
        self.wait()
        return y

    def wait(self) -> None:
        """Until the device has done everything."""
        began = self.clock()
        settle(self.device)
        self.waited += self.clock() - began


def host_seconds(step: OurStep, device: torch.device, *, count: int = 2) -> float:
    """Seconds of the host in a step: to read, to launch and to tell, without what it waits for the device.

    Between a forward and its backward the device is waited for: a full queue of launches would count as the host's.
    """
    stages = {number: Drained(stage, device) for number, stage in step.machine.stages.items()}
    take = step.telling(Silent(), replace(step.machine, stages=stages))  # type: ignore[arg-type]  # stages to an engine
    (last,) = stages.values()
    found = []
    for _ in range(count + 1):
        settle(device)
        before, began = last.waited, time.perf_counter()
        take()
        last.wait()
        found.append(time.perf_counter() - began - (last.waited - before))
    return statistics.median(found[1:])


def loop_costs(step: OurStep, device: torch.device) -> Row:
    """The host's, the update's and the log's seconds a step, by clocks of their own; ``STEPS`` steps are taken.

    ``seconds`` is a step that nobody is told of. ``update_share`` is computed: that of clip and update in a step of
    ``STEP_TOKENS`` tokens, of which all else takes as long a token as here.
    """
    host = host_seconds(step, device)
    update = statistics.median(seconds_of(step.update, device=device, count=5))
    with ExitStack() as opened:
        ways = {
            "silent": step.telling(Silent()),
            "between": step.telling(_reporter(step, opened, log_interval=NEVER)),
            "every": step.telling(_reporter(step, opened, log_interval=1)),
        }
        times = in_turns(ways, device=device, warmup=1, rounds=2, count=2)
    silent, between, every = (statistics.median(times[name]) for name in ways)
    derived = step.machine.derived
    num_tokens = derived.batches.global_batch_at(0) * derived.shape.seq_len
    others = max(silent - update, 0.0) * STEP_TOKENS / num_tokens
    return {
        "seconds": silent,
        "host_seconds": host,
        "host_share": host / silent,
        "update_seconds": update,
        "update_share": update / (update + others),
        "log_between": between / silent - 1,
        "log_every_step": every / silent - 1,
    }


def _reporter(step: OurStep, opened: ExitStack, *, log_interval: int) -> RankZeroReporter:
    """A run's own, whose files are in a folder that goes with ``opened``."""
    folder = Path(opened.enter_context(TemporaryDirectory(prefix="aquila_log_")))
    config = step.machine.config
    observe = replace(config.observe, log_interval=log_interval, log_dir=folder)
    machine = replace(step.machine, config=replace(config, observe=observe))
    return opened.enter_context(open_reporter(machine, Log(stream=io.StringIO())))
