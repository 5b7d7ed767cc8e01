"""Checkpoints: one safetensors file a rank and a manifest, written beside and renamed, ``latest`` last.

At every instant ``latest`` names a whole checkpoint: a run that is killed while saving loses the save, nothing else.
Saving a step that is there already replaces it: a run killed between the rename and ``latest``, or resumed from an
earlier step, comes to the same step again, and must not end there.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

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
from megatron_aquila.checkpoint.manifest import Json, Manifest, Piece, StoredTensor, piece_key
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.rectangles import Rectangle, cover_problem
from megatron_aquila.checkpoint.staging import Staging, write_at_once
from megatron_aquila.checkpoint.tensorfile import DTYPE_NAMES, DTYPES, Entry, FileRecord
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
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

    Chunks with a replica other than 0 are left out; of equal rectangles on several ranks (data-parallel replicas) the
    first rank's is written. With ``staging`` a thread of each rank writes copies, so that the tensors may change as
    soon as this is made; without it all is written then. Nothing has a final name before ``finish``.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        chunks: Sequence[Chunk],
        state: Mapping[str, Json],
        ctx: ParallelContext,
        staging: Staging | None = None,
    ) -> None:
        """Collective over the world: small tables are all-gathered, tensors are not communicated.

        Before a byte is written all ranks check that the chunks cover each logical tensor exactly once, else all raise
        CheckpointError. What fails later is ``finish``'s to tell.
        """
        self._step, self._state, self._world = step, state, ctx.host_world
        self._final = step_folder(root, step)
        self._temporary = beside(self._final, "tmp")
        mine = [chunk for chunk in chunks if chunk.replica == 0 and chunk.tensor.numel() > 0]
        with self._failing():
            self._tensors = _plan(together(lambda: [_describe(chunk) for chunk in mine], self._world))
            self._on_rank_0(lambda: _fresh_folder(self._temporary))
        entries = _entries(mine, self._tensors, ctx.rank)
        path = self._temporary / _file_name(ctx.rank)
        self._written: Future[FileRecord] | None = None
        if entries:
            try:
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
            files = {
                _file_name(rank): FileRecord(**record) for rank, record in enumerate(written) if record is not None
            }
            manifest = Manifest(
                step=self._step, state=self._state, files=files, tensors=self._tensors, saved=round(time.time(), 3)
            )
            self._on_rank_0(lambda: _publish(manifest, self._temporary, self._final))
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


def _describe(chunk: Chunk) -> list[Any]:
    assert chunk.tensor.dtype in DTYPE_NAMES, f"{chunk.name}: {chunk.tensor.dtype} has no name in safetensors"
    return [chunk.name, DTYPE_NAMES[chunk.tensor.dtype], chunk.global_shape, chunk.offset, tuple(chunk.tensor.shape)]


def _plan(tables: Sequence[Iterable[Any]]) -> dict[str, StoredTensor]:
    """Who writes what. Raises CheckpointError when the chunks of all ranks do not make whole tensors."""
    pieces: dict[str, dict[Rectangle, Piece]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank, table in enumerate(tables):
        for name, dtype, global_shape, offset, shape in table:
            kind = (tuple(global_shape), dtype)
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"{name}: rank {rank} has it as {kind}, an earlier rank as {kinds[name]}")
            rectangle = Rectangle(tuple(offset), tuple(shape))
            piece = Piece(_file_name(rank), piece_key(name, rectangle.offset), rectangle)
            pieces.setdefault(name, {}).setdefault(rectangle, piece)
    for name, found in pieces.items():
        problem = cover_problem(kinds[name][0], found)
        if problem is not None:
            raise CheckpointError(f"{name}: {problem}; nothing was saved")
    return {name: StoredTensor(kinds[name][0], DTYPES[kinds[name][1]], (*pieces[name].values(),)) for name in pieces}


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _fresh_folder(temporary: Path) -> None:
    """Only rank 0 makes it: on nodes that do not share the file system the others then fail instead of scattering."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _entries(mine: Sequence[Chunk], tensors: Mapping[str, StoredTensor], rank: int) -> list[Entry]:
    """What this rank writes of its chunks."""
    file = _file_name(rank)
    keys = {piece.key for stored in tensors.values() for piece in stored.pieces if piece.file == file}
    return [
        Entry(key, chunk.tensor.dtype, chunk.rectangle.shape, partial(Tensor.detach, chunk.tensor))
        for chunk in mine
        if (key := piece_key(chunk.name, chunk.offset)) in keys
    ]


def _publish(manifest: Manifest, temporary: Path, final: Path) -> None:
    for file, record in manifest.files.items():
        size = (temporary / file).stat().st_size
        if size != record.size:
            raise CheckpointError(f"{temporary / file}: {size} bytes arrived of {record.size}")
    write_text(temporary / MANIFEST, manifest.render())
    put_in_place(temporary, final)
    write_text(final.parent / LATEST, final.name + "\n")
