"""Which rank writes what of a checkpoint. It follows from the layout alone, so that a run agrees on it once.

At 512 ranks that is a table of a hundred thousand rectangles, seconds of work on every rank, and the better part of the
manifest, a further second on rank 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import Piece, StoredTensor, TensorTable, piece_key
from megatron_aquila.checkpoint.rectangles import Rectangle, cover_problem
from megatron_aquila.checkpoint.tensorfile import DTYPE_NAMES, DTYPES, Entry
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import Group


@dataclass(frozen=True)
class Shares:
    """All tensors of a checkpoint, each covered by its pieces exactly once, and rank ``rank``'s part of them.

    ``mine`` describes that rank's chunks as they were when it was agreed.
    """

    rank: int
    tensors: Mapping[str, StoredTensor]
    mine: Sequence[Sequence[Any]]

    @classmethod
    def agree(cls, chunks: Sequence[Chunk], world: Group) -> "Shares":
        """From the chunks of all ranks. Collective over ``world``: small tables are all-gathered, no tensors.

        Chunks with a replica other than 0 are left out; of equal rectangles on several ranks (data-parallel replicas)
        the first rank's is written. Raises CheckpointError on every rank unless they make whole tensors.
        """
        tables = together(lambda: _described(chunks), world)
        shares = cls(world.rank, _assign(tables), _described(chunks))
        if world.rank == 0:
            _ = shares.table
        return shares

    @cached_property
    def table(self) -> TensorTable:
        """The tensors as a manifest lists them, for whoever publishes it."""
        return TensorTable(self.tensors)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this rank writes."""
        file = file_name(self.rank)
        return sum(
            piece.rectangle.numel * stored.dtype.itemsize
            for stored in self.tensors.values()
            for piece in stored.pieces
            if piece.file == file
        )

    def entries(self, chunks: Sequence[Chunk]) -> list[Entry]:
        """What this rank writes of ``chunks``, which are laid out as they were; their values have changed."""
        found = _described(chunks)
        assert found == self.mine, (
            f"rank {self.rank} saves other tensors than were agreed: {found[:4]}, {self.mine[:4]}"
        )
        return [
            Entry(key, chunk.tensor.dtype, chunk.rectangle.shape, partial(Tensor.detach, chunk.tensor))
            for chunk in _written(chunks)
            if (key := piece_key(chunk.name, chunk.offset)) in self._keys
        ]

    @cached_property
    def _keys(self) -> frozenset[str]:
        file = file_name(self.rank)
        return frozenset(piece.key for stored in self.tensors.values() for piece in stored.pieces if piece.file == file)


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def _written(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Those that are anything and no copies of another rank's."""
    return [chunk for chunk in chunks if chunk.replica == 0 and chunk.tensor.numel() > 0]


def _described(chunks: Iterable[Chunk]) -> list[list[Any]]:
    rows = []
    for chunk in _written(chunks):
        dtype = chunk.tensor.dtype
        assert dtype in DTYPE_NAMES, f"{chunk.name}: {dtype} has no name in safetensors"
        rows.append([chunk.name, DTYPE_NAMES[dtype], chunk.global_shape, chunk.offset, tuple(chunk.tensor.shape)])
    return rows


def _assign(tables: Sequence[Iterable[Any]]) -> dict[str, StoredTensor]:
    """Who writes what. Raises CheckpointError when the chunks of all ranks do not make whole tensors."""
    pieces: dict[str, dict[Rectangle, Piece]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank, table in enumerate(tables):
        for name, dtype, global_shape, offset, shape in table:
            kind = (tuple(global_shape), dtype)
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"{name}: rank {rank} has it as {kind}, an earlier rank as {kinds[name]}")
            rectangle = Rectangle(tuple(offset), tuple(shape))
            piece = Piece(file_name(rank), piece_key(name, rectangle.offset), rectangle)
            pieces.setdefault(name, {}).setdefault(rectangle, piece)
    for name, found in pieces.items():
        problem = cover_problem(kinds[name][0], found)
        if problem is not None:
            raise CheckpointError(f"{name}: {problem}; nothing was saved")
    return {name: StoredTensor(kinds[name][0], DTYPES[kinds[name][1]], (*pieces[name].values(),)) for name in pieces}
