"""When a run's checkpoints are begun, published and thinned out: what the loop calls."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_aquila.checkpoint.retention import prune
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.staging import Staging
from megatron_aquila.checkpoint.store import Save
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Identity
from megatron_aquila.train.ephemeral import Ephemerals
from megatron_aquila.train.resume import begin_save, run_chunks
from megatron_aquila.train.state import TrainState


class SaveReporter(Protocol):
    """Who is told of checkpoints."""

    def note(self, text: str | None) -> None:
        """Something worth a line."""

    def record(self, event: str, **fields: Any) -> None:
        """An event for the run's ledger."""

    def stall(self, state: TrainState, seconds: float) -> None:
        """Training stood still for ``seconds`` while a checkpoint was begun."""


class Saver:
    """Saves a run, one checkpoint at a time; with ``--async-save`` training goes on while it is written.

    All ranks call the same methods at the same places of the loop, so that a checkpoint is published, or has failed,
    at the same step on all of them.
    """

    def __init__(
        self,
        machine: Machine,
        identity: Identity | None,
        reporter: SaveReporter,
        on_saved: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """``on_saved`` is given the folder of each checkpoint that is published, on every rank."""
        settings = machine.config.checkpoint
        self._machine, self._identity, self._reporter = machine, identity, reporter
        self._staging: Staging | None = None
        if settings.async_save:
            limit = int(settings.save_staging_gib * 2**30)
            self._staging = Staging(machine.ctx.device, limit_bytes=limit)
        self._ephemerals: Ephemerals | None = None
        if settings.ephemeral_save_interval is not None:
            self._ephemerals = Ephemerals(machine, identity, reporter, self._staging)
        self._on_saved = on_saved
        self._shares: Shares | None = None
        self._under_way: Save | None = None
        self._began = self._stall = 0.0

    def prepare(self, state: TrainState) -> None:
        """Agree who saves what, and begin to take the memory for it: so that the first save need not. Collective.

        Ephemeral checkpoints go, but for the one that ``state`` is of. Nothing where nothing is to be saved. Raises
        ``CheckpointError`` on every rank as ``Shares.agree``.
        """
        if self._machine.config.checkpoint.save is None:
            return
        self._shares = Shares.agree(run_chunks(self._machine), self._machine.ctx.host_world)
        num_bytes = self._shares.num_bytes
        if self._ephemerals is not None:
            num_bytes = max(num_bytes, self._ephemerals.prepare(state.step if state.taken else None))
        if self._staging is not None:
            self._staging.prepare(num_bytes)

    def begin(self, state: TrainState) -> None:
        """Begin to save the run as it is now; on return it may go on. Collective.

        Waits for the save before, should that still be under way. Raises ``CheckpointError`` on every rank.
        """
        began = time.perf_counter()
        if self._ephemerals is not None:
            self._ephemerals.finish()  # there is one memory for copies
        if self._under_way is not None:
            self._reporter.note(
                f"the save of step {state.step} waits for the one before: they come faster than the disk"
            )
            self.finish()
        waited_before = 0.0 if self._staging is None else self._staging.waited_seconds
        self._began = began
        self._under_way = begin_save(self._machine, state, self._identity, self._staging, self._shares)
        self._stall = time.perf_counter() - began
        self._reporter.stall(state, self._stall)
        if self._staging is not None and (waited := self._staging.waited_seconds - waited_before) > 0.1:
            way_out = "a larger --save-staging-gib holds more of the copy"
            self._reporter.note(f"{waited:.2f} s of it the copy waited for the disk: {way_out}")
        if self._staging is None:
            self.finish()

    def begin_ephemeral(self, state: TrainState) -> None:
        """Begin to save each rank's part on its node's disk, after ``poll``; on return the run may go on. Collective.

        Left out while another save is under way. What goes wrong is told and never raised.
        """
        assert self._ephemerals is not None, "nothing ephemeral is saved"
        if self._under_way is not None or self._ephemerals.is_under_way:
            self._reporter.note(f"the ephemeral save of step {state.step} is left out: another is still being written")
            return
        began = time.perf_counter()
        self._ephemerals.begin(state)
        self._reporter.stall(state, time.perf_counter() - began)
        if self._staging is None:
            self._ephemerals.finish()

    def forget_ephemerals(self) -> None:
        """Remove what is ephemeral: the run goes back behind it, or it may hold an error. Collective."""
        if self._ephemerals is not None:
            self._ephemerals.forget()

    def poll(self) -> None:
        """Publish the save under way once every rank has written its part. Collective; returns at once if not.

        A rank that could not write makes all raise ``CheckpointError``. While a save is under way this costs one
        all-reduce between the hosts, else nothing.
        """
        if self._ephemerals is not None:
            self._ephemerals.poll()
        if self._under_way is None:
            return
        told = torch.tensor([not self._under_way.is_written, self._under_way.has_failed], dtype=torch.float64)
        writing, failed = all_reduce_(told, self._machine.ctx.host_world).tolist()
        if writing == 0 or failed > 0:
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, publish it, and remove what ``--keep`` no longer covers. Collective.

        Nothing where none is under way. Raises ``CheckpointError`` on every rank.
        """
        if self._ephemerals is not None:
            self._ephemerals.finish()
        save, self._under_way = self._under_way, None
        if save is None:
            return
        folder = save.finish()
        seconds = time.perf_counter() - self._began
        self._reporter.note(f"saved {folder} in {seconds:.1f} s, of which training stood still for {self._stall:.2f} s")
        self._on_saved(folder)
        if self._ephemerals is not None:
            self._ephemerals.forget()
        self._reporter.note(self._prune())

    def _prune(self) -> str | None:
        """Rank 0 removes old checkpoints; a line where that failed, which is no reason to end a run."""
        settings = self._machine.config.checkpoint
        if settings.keep is None or settings.save is None or self._machine.ctx.rank != 0:
            return None
        try:
            prune(settings.save, settings.keep, every=settings.keep_every)
        except OSError as error:
            return f"old checkpoints in {settings.save} were not removed: {error}"
        return None
