"""Checkpoints: one safetensors file a rank and a manifest, written beside and renamed, ``latest`` last.

At every instant ``latest`` names a whole checkpoint: a run that is killed while saving loses the save, nothing else.
Saving a step that is there already replaces it: a run killed between the rename and ``latest``, or resumed from an
earlier step, comes to the same step again, and must not end there.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.checkpoint.folders import (
    LATEST,
    MANIFEST,
    beside,
    find_checkpoint,
    put_in_place,
    step_folder,
    write_text,
)
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import Json, Manifest, TensorTable
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.shares import Shares, file_name
from megatron_aquila.checkpoint.staging import Staging, write_at_once
from megatron_aquila.checkpoint.tensorfile import FileRecord
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.shape import ModelShape


class CheckpointReader(TensorReader):
    """A checkpoint on disk: ``path`` is one step's folder, or the root whose ``latest`` names it.

    ``step`` and ``state`` are what was saved beside the tensors; ``state["shape"]`` is the model's, as a mapping.
    ``verified``: its files were hashed already. Raises CheckpointError when there is no checkpoint, when it is damaged,
    or when another format wrote it.
    """

    def __init__(self, path: Path, *, verified: bool = False) -> None:
        folder = find_checkpoint(path)
        manifest = Manifest.read(folder / MANIFEST)
        for file in manifest.files:
            if (folder / file).is_symlink():
                raise CheckpointError(f"{folder / file}: a link, which may lead anywhere; put the file itself there")
        super().__init__(folder, manifest.tensors, {} if verified else manifest.files)
        self.manifest = manifest
        self.step = manifest.step
        self.state = manifest.state

    def shape_fields(self) -> Mapping[str, object]:
        """The saved model's ``ModelShape`` as a mapping. Raises CheckpointError when none was saved."""
        fields = self.state.get("shape")
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{self.folder / MANIFEST}: its state holds no model shape; a training run writes it")
        return fields

    def shape(self) -> ModelShape:
        """The saved model's shape. Raises CheckpointError when none was saved, or by a program with other fields."""
        fields: Any = self.shape_fields()
        try:
            return ModelShape(**fields)
        except TypeError as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST}: its model shape is of another version: {error}"
            ) from error


class Save:
    """A checkpoint on its way to the disk: ``chunks`` of all ranks and ``state`` (rank 0's) as ``root/step_<step>``.

    With ``staging`` a thread of each rank writes copies, so that the tensors may change as soon as this is made;
    without it all is written then. ``shares`` say who writes what; without them it is agreed. Nothing has a final name
    before ``finish``.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        chunks: Sequence[Chunk],
        state: Mapping[str, Json],
        world: Group,
        staging: Staging | None = None,
        shares: Shares | None = None,
    ) -> None:
        """Collective over ``world``, tensors are not communicated.

        Raises CheckpointError on every rank as ``Shares.agree``, or where rank 0 cannot make the folder, before a byte
        is written. What fails later is ``finish``'s to tell.
        """
        self._step, self._state, self._world = step, state, world
        self._final = step_folder(root, step)
        self._temporary = beside(self._final, "tmp")
        with self._failing():
            self._shares = Shares.agree(chunks, world) if shares is None else shares
            self._on_rank_0(lambda: _fresh_folder(self._temporary))
        path = self._temporary / file_name(world.rank)
        self._written: Future[FileRecord] | None = None
        try:
            entries = self._shares.entries(chunks)
            if entries:
                self._written = write_at_once(path, entries) if staging is None else staging.write(path, entries)
        except Exception as error:  # this rank's alone: ``finish`` makes it everyone's
            self._written = Future()
            self._written.set_exception(error)

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write, or has failed."""
        return self._written is None or self._written.done()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write what it should have."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def finish(self) -> Path:
        """Wait until every rank has written, publish the checkpoint and point ``latest`` at it. Collective, once.

        Returns its folder. A failure on any rank raises CheckpointError on every rank and leaves no final name.
        """
        with self._failing():
            written = together(lambda: None if self._written is None else asdict(self._written.result()), self._world)
            files = {file_name(rank): FileRecord(**record) for rank, record in enumerate(written) if record is not None}
            manifest = Manifest(
                step=self._step,
                state=self._state,
                files=files,
                tensors=self._shares.tensors,
                saved=round(time.time(), 3),
            )
            self._on_rank_0(lambda: _publish(manifest, self._shares.table, self._temporary, self._final))
        return self._final

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        together(lambda: action() if self._world.rank == 0 else None, self._world)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Remove what was written, and say which save it was."""
        try:
            yield
        except CheckpointError as error:
            if self._world.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            failure = CheckpointError(f"{self._final}: it could not be saved: {error}")
            failure.is_shared = True
            raise failure from error


def _fresh_folder(temporary: Path) -> None:
    """Only rank 0 makes it: on nodes that do not share the file system the others then fail instead of scattering."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _publish(manifest: Manifest, table: TensorTable, temporary: Path, final: Path) -> None:
    for file, record in manifest.files.items():
        size = (temporary / file).stat().st_size
        if size != record.size:
            raise CheckpointError(f"{temporary / file}: {size} bytes arrived of {record.size}")
    write_text(temporary / MANIFEST, manifest.render(table))
    put_in_place(temporary, final)
    write_text(final.parent / LATEST, final.name + "\n")
