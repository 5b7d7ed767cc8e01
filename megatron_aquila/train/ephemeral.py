"""``--ephemeral-save-interval``: checkpoints on each node's own disk between the durable ones, for a quick restart."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4
from zlib import crc32

import torch

from megatron_aquila.checkpoint.agree import agreed, together
from megatron_aquila.checkpoint.choose import candidates
from megatron_aquila.checkpoint.folders import MANIFEST, holds_run
from megatron_aquila.checkpoint.manifest import Manifest
from megatron_aquila.checkpoint.parts import ALONE, PART, Refusal, agree_on_parts, part_chunks, part_steps, remove_parts
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.staging import Staging
from megatron_aquila.checkpoint.store import CheckpointReader, Save
from megatron_aquila.config.saving import CheckpointConfig
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import CheckpointError
from megatron_aquila.observe.ledger import LEDGER_NAME, Event, read_ledger
from megatron_aquila.parallel.collectives import all_reduce_, gather_objects
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Identity
from megatron_aquila.train.report import ledger_folder
from megatron_aquila.train.resume import describe, owned_chunks
from megatron_aquila.train.start import checkpoint_name, without_left_out
from megatron_aquila.train.state import TrainState, digest_of


class Telling(Protocol):
    """Who is told what became of a save."""

    def note(self, text: str | None) -> None:
        """Print a line."""

    def record(self, event: str, **fields: Any) -> None:
        """Write an event into the ledger."""


class Ephemerals:
    """Saves each rank's part into its own folder, at most one at a time, and keeps the newest that all ranks have.

    All ranks call the same methods at the same places. What goes wrong on any of them is told, counted, and no reason
    to stop: the durable checkpoints are there.
    """

    def __init__(self, machine: Machine, identity: Identity | None, reporter: Telling, staging: Staging | None) -> None:
        self._machine, self._identity, self._reporter, self._staging = machine, identity, reporter, staging
        self._shares: Shares | None = None
        self._folder = Path()
        self._names: tuple[str, int] = ("", 0)  # of this start, and how many saves it has begun
        self._under_way: tuple[TrainState, Save | None, str | None] | None = None
        self._good: int | None = None  # the newest step of which every rank has its part
        self._failed_in_a_row = 0

    def prepare(self, came_from: int | None) -> int:
        """Remove all parts but those of step ``came_from``; bytes of a part. Collective.

        Raises ``CheckpointError`` on every rank where a variable in the folder's name is not set.
        """
        machine = self._machine
        self._folder = agreed(lambda: rank_folder(machine.config.checkpoint, machine.ctx.rank), machine.ctx.host_world)
        self._names = (together(lambda: uuid4().hex[:12], machine.ctx.host_world)[0], 0)
        self._shares = Shares.agree(part_chunks(owned_chunks(machine)), ALONE)
        self._good = came_from
        self._remove()
        return self._shares.num_bytes

    @property
    def is_under_way(self) -> bool:
        """Whether a save has begun and not ended; the same on all ranks."""
        return self._under_way is not None

    def begin(self, state: TrainState) -> None:
        """Begin to save this rank's part. Local: on return the run may go on."""
        assert self._under_way is None, f"step {state.step}: the save before it is under way"
        assert self._shares is not None, f"step {state.step}: not prepared"
        start, number = self._names
        self._names = (start, number + 1)
        machine, save, failure = self._machine, None, None
        described = describe(machine.config, machine.derived.shape, state, self._identity)
        try:
            save = Save(
                self._folder,
                state.step,
                part_chunks(owned_chunks(machine)),
                {**described, PART: f"{start}.{number}"},
                ALONE,
                self._staging,
                self._shares,
            )
        except CheckpointError as error:
            failure = str(error)
        self._under_way = (state, save, failure)

    def poll(self) -> None:
        """End the save once every rank has written its part, or one has failed. Collective; returns at once if not."""
        if self._under_way is None:
            return
        _, save, _ = self._under_way
        writing = torch.tensor([save is not None and not save.is_written], dtype=torch.float64)
        if all_reduce_(writing, self._machine.ctx.host_world).item() == 0:
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way; all goes but the newest of which every rank has its part. Collective."""
        if self._under_way is None:
            return
        (state, save, failure), self._under_way = self._under_way, None
        try:
            if save is not None:
                save.finish()
        except CheckpointError as error:
            failure = str(error)
        world = self._machine.ctx.host_world
        failures = {rank: why for rank, why in zip(world.ranks, gather_objects(failure, world), strict=True) if why}
        about = {"step": state.step, "samples": state.consumed_samples, "parent": state.parent}
        if not failures:
            self._good, self._failed_in_a_row = state.step, 0
            self._reporter.record("ephemeral", outcome="saved", **about)
            self._reporter.note(f"saved step {state.step} on the nodes' own disks")
            self._remove()
            return
        self._remove()  # the parts of this step on other ranks
        self._failed_in_a_row += 1
        rank, why = min(failures.items())
        reason = f"on {len(failures)} of {world.size} ranks, rank {rank}: {why}"
        self._reporter.record("ephemeral", outcome="failed", reason=reason, **about)
        self._reporter.note(
            f"EPHEMERAL SAVE FAILED, step {state.step}, {self._failed_in_a_row} in a row: {reason}\n"
            "  training goes on; until one succeeds, a restart goes back to an older one"
        )

    def forget(self) -> None:
        """Remove all parts: there is a newer durable checkpoint, or the run went back behind them. Collective."""
        self.finish()
        self._good = None
        self._remove()

    def _remove(self) -> None:
        try:
            remove_parts(self._folder, but=self._good)
        except OSError as error:
            self._reporter.note(f"old ephemeral checkpoints in {self._folder} were not removed: {error}")


def rank_folder(settings: CheckpointConfig, rank: int) -> Path:
    """Where a rank keeps its parts: ``DIR/RUN-<of its path>/rank_00003``, variables of the environment filled in.

    Raises ``CheckpointError`` where one is not set.
    """
    assert settings.save is not None, "ephemeral saves without --save"
    assert settings.ephemeral_save_dir is not None, "ephemeral saves without --ephemeral-save-dir"
    root = os.path.expandvars(settings.ephemeral_save_dir)
    if "$" in root:
        raise CheckpointError(f"--ephemeral-save-dir {root}: a variable in it is not set; set it on every node")
    save = settings.save.resolve()
    return Path(root) / f"{save.name}-{crc32(str(save).encode()):08x}" / f"rank_{rank:05d}"


def any_parts(settings: CheckpointConfig, ctx: ParallelContext) -> bool:
    """Whether a rank has parts of ephemeral checkpoints that the run may go on from, whole or not. Collective.

    Not where the run does not go on from its own folder. Raises ``CheckpointError`` on every rank as ``rank_folder``.
    """
    if settings.ephemeral_save_dir is None or not settings.resumes_own or not settings.load_optim:
        return False
    return any(together(lambda: bool(part_steps(rank_folder(settings, ctx.rank))), ctx.host_world))


def find_parts(machine: Machine, warn: Callable[[str], None]) -> Path | None:
    """This rank's part of the newest ephemeral checkpoint that follows the run's last durable one. Collective.

    None where there is none, or one is refused, of which ``warn`` is told. To be asked where there are ``any_parts``.
    """
    config, ctx = machine.config, machine.ctx
    folder = rank_folder(config.checkpoint, ctx.rank)
    (last, *_) = together(lambda: _last_durable(config) if ctx.rank == 0 else None, ctx.host_world)
    shares = Shares.agree(part_chunks(owned_chunks(machine)), ALONE)
    found, refused = agree_on_parts(folder, shares, ctx.host_world, lambda reader: _problem(reader, last, config))
    for refusal in refused:
        warn(refusal_line(refusal, found))
    return found


def refusal_line(refusal: Refusal, found: Path | None) -> str:
    """What a start says of parts that it does not go on from."""
    instead = "the last durable checkpoint, if there is one" if found is None else f"the older one, {found.name}"
    return f"EPHEMERAL CHECKPOINT of step {refusal.step}, not taken: {refusal.reason}\n  the run goes on from {instead}"


def _last_durable(config: RunConfig) -> Mapping[str, Any]:
    """What parts must follow: name and digest of the checkpoint that ``latest`` names; and the run's name.

    Where nothing is saved yet both are None, and ``begun`` is the name of another folder's checkpoint that the run
    began from, if it did.
    """
    save, log = config.checkpoint.save, ledger_folder(config)
    assert save is not None, "ephemeral saves without --save"
    name = digest = None
    if holds_run(save):
        newest = candidates(save, lambda text: None)[0]
        name = checkpoint_name(newest)
        try:
            digest = digest_of(cast(Mapping[str, Any], Manifest.read(newest / MANIFEST).state["train"]))
        except (CheckpointError, KeyError):
            digest = "none: it cannot be read"
    kept = [] if log is None or not (log / LEDGER_NAME).exists() else read_ledger(log)
    starts = [event for event in kept if event["event"] == "start"]
    run = starts[-1]["run"] if starts else None
    return {"name": name, "digest": digest, "run": run, "begun": _begun_from(starts)}


def _begun_from(starts: Sequence[Event]) -> str | None:
    """The checkpoint of the last start that was not from parts, where it lay in another folder."""
    found = [event["checkpoint"] for event in starts]
    durable = [one for one in found if one is None or not one.get("ephemeral")]
    return None if not durable or durable[-1] is None or durable[-1]["own"] else str(durable[-1]["name"])


def _problem(reader: CheckpointReader, last: Mapping[str, Any], config: RunConfig) -> str | None:
    """Why a part is not of this run's newest work. Raises ``CheckpointError`` where it trained on what is left out."""
    state = TrainState.from_json(cast(Mapping[str, Any], reader.state["train"]))
    newest = "nothing yet" if last["name"] is None else f"{last['name']}"
    follows = (state.parent, state.parent_digest) == (last["name"], last["digest"])
    if last["name"] is None:
        follows = state.parent == last["begun"]
    if not follows:
        return f"{reader.folder}: it follows {state.parent or 'the beginning'}, but saved last is {newest}"
    if last["name"] is None and state.run != last["run"]:
        return f"{reader.folder}: it is of run {state.run}, the folder of --save holds {last['run'] or 'none'}"
    without_left_out(state, config, reader.folder)
    return None
