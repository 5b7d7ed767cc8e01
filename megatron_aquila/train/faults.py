"""Bad numbers: what becomes of a run whose loss or gradients are not finite, or a spike.

Every rank judges from the same figures and so does the same; where that leads to a collective, ``rewind`` makes sure.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_aquila.checkpoint.agree import agreed, together
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.schema import TrainConfig
from megatron_aquila.errors import AquilaError
from megatron_aquila.observe.ledger import Ranges
from megatron_aquila.optim.scaler import LossScaling
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.resume import load_weights
from megatron_aquila.train.start import find_start
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.step import Step, StepOutcome

MAX_NOT_APPLIED = 20  # steps in a row: the run is lost
MAX_REWINDS = 5  # to one checkpoint: what it holds is no good

Policy = Literal["warn", "skip", "stop", "rewind"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A step with bad numbers. ``policy`` is what the settings want done, ``reason`` names step, samples, figures."""

    policy: Policy
    step: int
    samples: tuple[int, int]
    reason: str


class Judge:
    """Looks at every settled step. Local: the figures are those of all ranks.

    In fp16 a gradient that is not finite is a fault only once the loss scale is at its lowest.
    """

    def __init__(self, train: TrainConfig, scaling: LossScaling) -> None:
        self._train, self._scaling = train, scaling
        self._in_a_row: list[tuple[int, int]] = []  # samples of the last steps that were not applied

    def fault(self, step: Step, outcome: StepOutcome) -> Fault | None:
        """What is wrong with a step, if anything. Raises ``AquilaError`` where the run is lost."""
        report = outcome.report
        if report is None:
            return None
        lowers_scale = not outcome.is_finite and not self._scaling.is_lowest(outcome.state.loss_scale)
        if report.applied or lowers_scale:
            self._in_a_row = []
        else:
            self._in_a_row.append(step.samples)
        if len(self._in_a_row) >= MAX_NOT_APPLIED:
            raise lost(report.step, self._in_a_row)
        if lowers_scale or (outcome.is_finite and not outcome.is_spike):
            return None
        what = "a spike" if outcome.is_finite else "not finite"
        figures = f"loss {report.loss:.6g}, gradient norm {report.grad_norm:.6g}"
        start, stop = step.samples
        return Fault(
            policy=self._train.on_spike if outcome.is_finite else self._train.on_nonfinite,
            step=report.step,
            samples=step.samples,
            reason=f"step {report.step}, samples {start}-{stop - 1}: {what} ({figures})",
        )


def lost(step: int, in_a_row: list[tuple[int, int]]) -> AquilaError:
    """The error of a run in which nothing is applied any more; every rank raises it."""
    error = AquilaError(
        f"step {step}: no update was applied for {len(in_a_row)} steps, samples {in_a_row[0][0]} to {in_a_row[-1][1]}: "
        "their gradients were not finite, or spikes; resume from an earlier checkpoint with a lower --lr"
    )
    error.is_shared = True
    return error


def stopped(fault: Fault) -> AquilaError:
    """The error of a run that stopped for bad numbers; every rank raises it."""
    error = AquilaError(f"{fault.reason}: the update was left out and the run stopped; a run that resumes goes past it")
    error.is_shared = True
    return error


class Rewinder:
    """Takes a run back to the last checkpoint of its own past, without leaving the process.

    ``good`` is that checkpoint: the one that the run came from, or saved last.
    """

    def __init__(self, machine: Machine, corpus: Corpus, good: Path | None, left_out: Ranges = ()) -> None:
        """``left_out``: what a run that goes on from ``good`` does not train on, though the checkpoint may not know."""
        self._machine, self._corpus = machine, corpus
        self._good, self._times = good, 0
        self._left_out = left_out

    def saved(self, checkpoint: Path) -> None:
        """A newer one is there, which knows what is left out."""
        self._good, self._times, self._left_out = checkpoint, 0, ()

    def back(self, fault: Fault, decided: Callable[[Path], None] = lambda checkpoint: None) -> TrainState:
        """The state of the checkpoint, all tensors as it has them, without the samples of the fault.

        ``decided`` is told of the checkpoint once it is sure that the run goes back there, and before anything is lost:
        what it writes down, a run that is killed from here on finds. All ranks call it; it raises on all or on none.

        Collective: all ranks say what they go back from. Raises ``AquilaError`` on every rank where there is nothing to
        go back to, or where the run has gone back there ``MAX_REWINDS`` times; ``CheckpointError`` as a start.
        """
        machine, good = self._machine, self._good
        agreed(lambda: self._check(fault), machine.ctx.world)
        faults = together(lambda: [fault.step, *fault.samples], machine.ctx.world)
        assert all(other == faults[0] for other in faults), f"ranks go back from different steps: {faults}"
        assert good is not None, "checked"
        # its own checkpoint: continued whole, whatever the run itself began from
        config = replace(machine.config, checkpoint=replace(machine.config.checkpoint, load_optim=True))
        start = agreed(lambda: find_start(config, machine.derived, good, None), machine.ctx.world)
        agreed(lambda: CheckpointReader(good), machine.ctx.world).verify_files(machine.ctx.world)
        decided(good)
        load_weights(machine, start)
        self._times += 1
        self._left_out = (*self._left_out, fault.samples)
        back = start.state.without(self._left_out)
        self._corpus.train.leave_out(back.skipped_samples, seq_len=machine.derived.shape.seq_len)
        return back

    def _check(self, fault: Fault) -> None:
        if self._good is None:
            raise AquilaError(f"{fault.reason}: no checkpoint is there to go back to; start again with a lower --lr")
        if self._times >= MAX_REWINDS:
            raise AquilaError(
                f"{fault.reason}: the run has gone back to {self._good} {self._times} times; resume from an earlier "
                "checkpoint, or with a lower --lr"
            )
