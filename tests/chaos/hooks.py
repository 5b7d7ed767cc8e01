"""``aquila pretrain`` to which something happens: hooks in this process, none of it in the package.

``AQUILA_CHAOS`` names a file with the plan. Each start of a run takes the first of its faults that has not come yet.
Under torchrun this module is the script.
"""

import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_aquila.checkpoint import staging, store
from megatron_aquila.checkpoint.folders import LATEST
from megatron_aquila.checkpoint.tensorfile import Entry
from megatron_aquila.commands import pretrain
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.train import evaluate, faults, run, trainer
from megatron_aquila.train.record import RunRecord
from tests.chaos.damage import fill, pick
from tests.chaos.faults import KINDS, Fault

PLAN = "AQUILA_CHAOS"


@dataclass(frozen=True, slots=True)
class Marks:
    """Files that say when a fault came and when the run took its next step."""

    folder: Path

    @property
    def num_fired(self) -> int:
        """How many faults have come."""
        return len([*self.folder.glob("fired_*[0-9]")])

    def fired(self, number: int) -> Path:
        """Of fault ``number``; holds when, and the process."""
        return self.folder / f"fired_{number}"

    def stepped(self, number: int) -> Path:
        """The first step after so many faults."""
        return self.folder / f"stepped_{number}"

    def go(self) -> Path:
        """A run that waits in a step may go on."""
        return self.folder / "go"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to befall the next starts of a run, in order.

    ``filler`` is the file that fills the small disk, removed at the next start; without one writing fails as if the
    disk were full.
    """

    marks: Marks
    faults: tuple[Fault, ...]
    filler: Path | None

    def write(self, path: Path) -> Path:
        """Into a file, for ``read``."""
        faults = [asdict(fault) for fault in self.faults]
        filler = None if self.filler is None else str(self.filler)
        path.write_text(json.dumps({"marks": str(self.marks.folder), "faults": faults, "filler": filler}))
        return path

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """From the file."""
        found = json.loads(path.read_text())
        filler = None if found["filler"] is None else Path(found["filler"])
        return cls(Marks(Path(found["marks"])), tuple(Fault(**fault) for fault in found["faults"]), filler)


def mark(path: Path) -> None:
    """Write when, and which process, whole or not at all; the first stays."""
    if path.exists():
        return
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(f"{time.time()} {os.getpid()}")
    os.replace(beside, path)


class Injector:
    """Injects one fault into this process, if it is its rank's."""

    def __init__(self, fault: Fault, plan: Plan) -> None:
        self._fault, self._marks, self._filler, self._count = fault, plan.marks, plan.filler, 0

    def fire(self, number: int | None = None) -> None:
        """Mark it, and send this process the signal, if the fault is one."""
        mark(self._marks.fired(self._fault.number))
        if number is not None:
            os.kill(os.getpid(), number)

    @property
    def is_now(self) -> bool:
        """Counts calls: whether the place was come to often enough, once."""
        self._count += 1
        return self._count == self._fault.after

    def install(self) -> None:
        """Put the hook where the fault's kind belongs."""
        what, _, where = self._fault.kind.partition("-")
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hang": signal.SIGSTOP}.get(what)
        if self._fault.kind in PLACES:
            PLACES[self._fault.kind](self)
        elif number is not None:
            PLACES[where](self, number)

    def at_start(self, number: int) -> None:
        """At a random moment of what comes before the first step."""
        places = ("resolve_checkpoint", "build_machine", "build_corpus", "load_weights")
        self.before(run, places[int(self._fault.share * len(places))], lambda *_: self.fire(number))

    def at_step(self, number: int) -> None:
        """At a random moment of a step; it is asked for by a thread."""
        delay = 0.05 * self._fault.share

        def soon(*_: Any) -> None:
            if self.is_now:
                threading.Timer(delay, self.fire, (number,)).start()

        self.before(trainer, "train_step", soon)

    def at_evaluation(self, number: int) -> None:
        """Between a validation's batches."""
        self.before(evaluate, "agree", lambda *_: self.fire(number) if self.is_now else None)

    def at_copy(self, number: int) -> None:
        """Before one of the tensors of a save is copied."""
        which = 1 + int(self._fault.share * 12)
        self.before(Entry, "fetch", lambda *_: self._at(which, number))

    def _at(self, which: int, number: int) -> None:
        self._count += 1
        if self._count == which:
            self.fire(number)

    def at_write(self, number: int) -> None:
        """In the thread that writes, after one of its blocks."""
        right, which = staging.write_stream, int(self._fault.share * 2)

        def cut(parts: Any) -> Iterator[Any]:
            for count, part in enumerate(parts):
                yield part
                if count == which:
                    self.fire(number)

        staging.write_stream = lambda path, parts: right(path, cut(parts))

    def at_rename(self, number: int) -> None:
        """Before a checkpoint gets its final name."""
        self.before(store, "put_in_place", lambda *_: self.fire(number))

    def at_latest(self, number: int) -> None:
        """The checkpoint has its name, ``latest`` is not written."""
        self.before(store, "write_text", lambda path, _: self.fire(number) if path.name == LATEST else None)

    def at_ledger(self, number: int) -> None:
        """``latest`` is written, the ledger does not know of it."""
        self.before(RunRecord, "saved", lambda *_: self.fire(number))

    def in_save(self, number: int) -> None:
        """Anywhere in a save."""
        places = (self.at_copy, self.at_write, self.at_rename, self.at_latest, self.at_ledger)
        places[int(self._fault.share * (5 if self._fault.rank == 0 else 2))](number)

    def fill_disk(self) -> None:
        """The disk is full before a byte of a save is written, or takes a part of it."""
        if self._filler is None:
            self.before(staging, "write_stream", self._refuse)
            return

        def fill_now(*_: Any) -> None:
            if not self.is_now:
                return
            self.fire()
            fill(self._filler)
            if self._fault.share > 0.5:
                os.truncate(self._filler, self._filler.stat().st_size - 8192)

        self.before(staging, "header_and_order", fill_now)

    def _refuse(self, *_: Any) -> None:
        if self.is_now:
            self.fire()
            raise OSError(errno.ENOSPC, "No space left on device")

    def poison(self) -> None:
        """NaN in an element of this rank's gradients."""

        def to_nan(optimizer: DistributedOptimizer, *_: Any) -> None:
            if self.is_now:
                self.fire()
                counted = pick(optimizer._counted, self._fault.share)  # not padding, which no norm counts
                counted[int(self._fault.share * len(counted))] = torch.nan

        self.before(DistributedOptimizer, "clip", to_nan)

    def at_rewind(self, number: int) -> None:
        """Once NaN in this rank's gradients has sent the run back: while it loads, or before its next step."""
        self.poison()
        place = (faults, "load_weights") if self._fault.share < 0.5 else (trainer.Loop, "_take")
        right, is_back = trainer.Loop._go_back, []

        def back(*args: Any) -> None:
            is_back.append(True)
            right(*args)

        trainer.Loop._go_back = back
        self.before(*place, lambda *_: self.fire(number) if is_back else None)

    def flip_weight(self) -> None:
        """Another bit in one weight as this replica received it."""

        def flip(infos: Any, *_: Any) -> None:
            if self.is_now:
                self.fire()
                bits = infos[0].param.data.view(-1).view(torch.int32)
                bits[int(self._fault.share * len(bits))] ^= 1 << int(self._fault.share * 23)

        self.before(trainer, "check_replicated", flip)

    def wait_in_step(self) -> None:
        """The run is under way until it is told to go on."""

        def wait(*_: Any) -> None:
            if self.is_now:
                self.fire()
                while not self._marks.go().exists():
                    time.sleep(0.01)

        self.before(trainer, "train_step", wait)

    def before(self, place: Any, name: str, action: Callable[..., Any]) -> None:
        """Have ``action`` called with the positional arguments before ``place.name`` is."""
        right = getattr(place, name)

        def first(*args: Any, **words: Any) -> Any:
            action(*args)
            return right(*args, **words)

        setattr(place, name, first)


PLACES: dict[str, Callable[..., None]] = {
    "start": Injector.at_start,
    "step": Injector.at_step,
    "": Injector.at_step,
    "eval": Injector.at_evaluation,
    "copy": Injector.at_copy,
    "write": Injector.at_write,
    "rename": Injector.at_rename,
    "latest": Injector.at_latest,
    "ledger": Injector.at_ledger,
    "save": Injector.in_save,
    "full-disk": Injector.fill_disk,
    "nan-skip": Injector.poison,
    "nan-rewind": Injector.poison,
    "nan-stop": Injector.poison,
    "rewind": Injector.at_rewind,
    "flip-weight": Injector.flip_weight,
    "two-runs": Injector.wait_in_step,
}


def tell_of_steps(marks: Marks, fault: Fault | None) -> None:
    """Mark the first step of this start, and the first after a fault that it has to survive."""
    right, before = trainer.Steps.take, marks.num_fired
    survives = fault is not None and KINDS[fault.kind].ending == "goes on"

    def take(steps: Any, state: Any, *, stop_requested: bool) -> Any:
        has_fired = fault is not None and survives and marks.fired(fault.number).exists()
        found = right(steps, state, stop_requested=stop_requested)
        if found is not None:
            mark(marks.stepped(before + has_fired))
        return found

    trainer.Steps.take = take


def main(flags: list[str]) -> int:
    """Run, with the next fault of the plan; returns the exit status."""
    plan, rank = Plan.read(Path(os.environ[PLAN])), int(os.environ["RANK"])
    fault = next((fault for fault in plan.faults if not plan.marks.fired(fault.number).exists()), None)
    if rank == 0:
        if plan.filler is not None:
            plan.filler.unlink(missing_ok=True)
        tell_of_steps(plan.marks, fault)
    if fault is not None and fault.rank == rank:
        Injector(fault, plan).install()
    return pretrain.main(flags)


def forked(rank: int, world: int, port: int, plan: str, flags: list[str], out: str) -> None:
    """The body of a process that stands in for one of torchrun's; what it prints goes to ``out``. Never returns."""
    file = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=f"chaos {port}")
    os.environ[PLAN] = plan
    status = 1
    try:
        status = main(flags)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
