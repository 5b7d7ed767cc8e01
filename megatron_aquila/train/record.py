"""What a run tells its ledger: where it starts, what its steps took, and what each checkpoint comes from."""

import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

from megatron_aquila import __version__
from megatron_aquila.checkpoint.agree import together
from megatron_aquila.checkpoint.folders import MANIFEST
from megatron_aquila.checkpoint.manifest import Manifest
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import all_settings, value_of
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.observe.ledger import LEDGER_NAME, Ranges, read_ledger
from megatron_aquila.observe.lineage import left_out_after
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.corpus import Identity
from megatron_aquila.train.faults import Fault
from megatron_aquila.train.report import ledger_folder
from megatron_aquila.train.start import Start, checkpoint_name
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.upcoming import upcoming

CLOCK_SECONDS = 0.01  # both times are rounded
SOURCE_TREE = Path(__file__).parents[2]


class Recording(Protocol):
    """Who writes the ledger: on rank 0, if the run has a folder."""

    def record(self, event: str, **fields: Any) -> None:
        """Write an event."""

    def note(self, text: str | None) -> None:
        """Print a line."""


class RunRecord:
    """Keeps what steps took since the last checkpoint, and writes the events of a run. Local, on every rank."""

    def __init__(self, reporter: Recording, source: SampleSource, taken: Ranges = ()) -> None:
        """``taken``: by steps before this start, since the last durable checkpoint."""
        self._reporter, self._source = reporter, source
        self._taken = [*taken]
        self._under_way: list[dict[str, Any]] = []  # of checkpoints that are being written, the oldest first

    def took(self, samples: tuple[int, int]) -> None:
        """A step was launched over a half-open range."""
        if self._taken and self._taken[-1][1] == samples[0]:
            self._taken[-1] = (self._taken[-1][0], samples[1])
        else:
            self._taken.append(samples)

    def to_be_saved(self, state: TrainState) -> TrainState:
        """The state as a checkpoint is to hold it: with the digest of what comes next. Reads that."""
        state = self.as_it_is(state)
        self._under_way.append(checkpoint_event(state))
        self._taken = []
        return state

    def as_it_is(self, state: TrainState) -> TrainState:
        """The state as an ephemeral checkpoint is to hold it; what was taken is still to be saved."""
        return replace(state, taken=tuple(self._taken), upcoming=upcoming(self._source, state.consumed_samples))

    def saved(self, checkpoint: Path) -> None:
        """The oldest state that was to be saved is whole on the disk."""
        about = self._under_way.pop(0)
        self._reporter.record("checkpoint", name=checkpoint_name(checkpoint), **about)
        self._reporter.note(digest_line(about))

    def skipped(self, step: int, samples: tuple[int, int], reason: str) -> None:
        """A step's update was left out."""
        self._reporter.record("skip", step=step, samples=samples, reason=reason)

    def rewound(self, state: TrainState, checkpoint: Path, fault: Fault) -> None:
        """The run goes back to a checkpoint; ``state`` is given up."""
        self._reporter.record(
            "rewind",
            step=state.step,
            samples=state.consumed_samples,
            checkpoint=checkpoint_name(checkpoint),
            ranges=self._taken,
            skipped=[fault.samples],
            reason=fault.reason,
        )
        self._taken = []

    def stopped(self, state: TrainState, reason: str, *, failed: bool) -> None:
        """The run ends here, as far as this process has a say."""
        self._reporter.record(
            "stop",
            step=state.step,
            samples=state.consumed_samples,
            reason=reason,
            failed=failed,
            ranges=[*(one for about in self._under_way for one in about["ranges"]), *self._taken],
        )


def checkpoint_event(state: TrainState) -> dict[str, Any]:
    """The fields of a ledger's ``checkpoint``, but for its name, of the state that it holds."""
    ahead = state.upcoming
    return {
        "parent": state.parent,
        "step": state.step,
        "samples": state.consumed_samples,
        "ranges": state.taken,
        "skipped": state.skipped_samples,
        "next_samples": None if ahead is None else [ahead.start, ahead.stop],
        "digest": None if ahead is None else ahead.digest,
    }


def unrecorded(config: RunConfig, start: Start) -> dict[str, Any] | None:
    """The ``checkpoint`` event of the run's own one that it starts from, where the ledger lacks it.

    A kill came after `latest` was written and before the ledger's line was. Raises ``AquilaError`` where one of them
    cannot be read.
    """
    folder, found = ledger_folder(config), start.checkpoint
    if folder is None or found is None or not start.with_optimizer or not is_own(config, found):
        return None
    manifest = Manifest.read(found / MANIFEST)
    state, name = TrainState.from_json(cast(Mapping[str, Any], manifest.state["train"])), checkpoint_name(found)
    if not state.taken or not (folder / LEDGER_NAME).exists():  # of a version that did not keep them
        return None
    for event in read_ledger(folder):
        told = event["event"] == "checkpoint" and event["name"] == name
        if told and datetime.fromisoformat(event["time"]).timestamp() > manifest.saved - CLOCK_SECONDS:
            return None
    return {"name": name, **checkpoint_event(state)}


def without_rewound(start: Start, config: RunConfig, ctx: ParallelContext) -> Start:
    """The start without the samples that rewinds of this run left out after its checkpoint, as its ledger tells them.

    The checkpoint itself does not know: the run ended before it saved the next one. Rank 0 reads for all: collective.
    Raises ``CheckpointError`` on every rank where the ledger is damaged.
    """
    folder, found = ledger_folder(config), start.checkpoint
    if folder is None or found is None or not start.with_optimizer:
        return start
    names = [checkpoint_name(found)] if is_own(config, found) else [str(found.resolve()), str(found)]
    if start.is_part:  # rewinds go back to the durable checkpoint before it
        names = [] if start.state.parent is None else [start.state.parent]
    is_told = ctx.rank == 0 and (folder / LEDGER_NAME).exists()

    def told() -> Ranges:
        return left_out_after(read_ledger(folder), *names) if is_told else ()

    (ranges, *_) = together(told, ctx.world)
    return replace(start, state=start.state.without(tuple((first, stop) for first, stop in ranges)))


def is_own(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the checkpoint lies in the folder that the run saves to."""
    save = config.checkpoint.save
    return save is not None and checkpoint.parent.resolve() == save.resolve()


def digest_line(saved: Mapping[str, Any]) -> str:
    """What a checkpoint says of the samples that come next, as a run that continues it says it."""
    start, stop = saved["next_samples"]
    return f"the next samples, {start}-{stop - 1}: digest {saved['digest']}" if start < stop else "no sample comes next"


def named(state: TrainState, config: RunConfig, ctx: ParallelContext) -> TrainState:
    """The state with the name of its run: the checkpoint's, the ledger's, or a new one. Collective.

    Raises ``CheckpointError`` on every rank where the ledger is damaged.
    """
    folder = ledger_folder(config)

    def name() -> str:
        if state.run:
            return state.run
        kept = [] if folder is None or not (folder / LEDGER_NAME).exists() else read_ledger(folder)
        names = [event["run"] for event in kept if event["event"] == "start"]
        return str(names[-1]) if names else uuid4().hex[:12]

    (run, *_) = together(lambda: name() if ctx.rank == 0 else None, ctx.world)
    return replace(state, run=run)


def start_event(
    config: RunConfig, ctx: ParallelContext, start: Start, state: TrainState, identity: Identity | None
) -> Mapping[str, Any]:
    """The fields of a ledger's ``start``. Local, for rank 0."""
    settings = config.checkpoint
    found = start.checkpoint if start.with_optimizer else None
    grid = ctx.grid
    return {
        "run": state.run,
        "origin": "fresh" if found is None else "auto" if settings.resumes_own else "load",
        "checkpoint": None
        if found is None
        else {
            "name": checkpoint_name(found),
            "path": str(found.resolve()),
            "own": start.is_part or is_own(config, found),
            "step": state.step,
            "samples": state.consumed_samples,
            **({"ephemeral": True, "parent": state.parent, "ranges": state.taken} if start.is_part else {}),
        },
        "weights": None if start.checkpoint is None or found is not None else str(start.checkpoint),
        "step": state.step,
        "samples": state.consumed_samples,
        "skipped": state.skipped_samples,
        "version": __version__,
        "commit": commit(),
        "world": grid.world_size,
        "layout": {axis: getattr(grid, axis) for axis in ("tp", "cp", "dp", "pp")},
        "config": {name: plain(value_of(config, name)) for name in all_settings()},
        "data": None if identity is None else asdict(identity),
    }


def plain(value: object) -> object:
    """A setting's value as JSON has it; what JSON has no word for as text."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def commit() -> str | None:
    """The commit of the source tree that runs, with ``-dirty`` where files differ; None where there is none."""
    if not (SOURCE_TREE / ".git").exists():
        return None
    command = ["git", "-C", str(SOURCE_TREE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
