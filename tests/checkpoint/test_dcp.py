"""torch's own distributed checkpoints cut and join the same rectangles: an oracle for the slicing, in one process."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_aquila.checkpoint.layout import Chunk, range_chunks
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.parallel.context import ParallelContext
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import assert_filled, fill, optimizer_chunks, owned_ranges, parameters, whole_chunks

LAYOUTS = [(tp, pp, dp) for tp, pp, dp in itertools.product((1, 2, 4), (1, 2), (1, 2, 3)) if (tp, pp, dp) != (4, 2, 3)]
DTYPE = torch.float32


class Pieces(torch.Tensor):
    """Rectangles of one logical tensor, as DCP asks for them."""

    pieces: Sequence[Chunk]

    @staticmethod
    def __new__(cls, pieces: Sequence[Chunk]) -> "Pieces":
        """A tensor of the logical shape without memory."""
        made: Pieces = torch.Tensor._make_wrapper_subclass(cls, pieces[0].global_shape, dtype=DTYPE, device="cpu")
        made.pieces = pieces
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing is computed with it."""
        raise AssertionError(f"{func} of a table of contents")

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(piece.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.size()),
                    properties=TensorProperties.create_from_tensor(piece.tensor),
                    size=torch.Size(piece.global_shape),
                ),
            )
            for piece in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.size()) for piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(piece.tensor for piece in self.pieces if torch.Size(piece.offset) == index.offset)


def tables(chunks: Sequence[Chunk]) -> dict[str, Pieces]:
    by_name: defaultdict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_name[chunk.name].append(chunk)
    return {name: Pieces(pieces) for name, pieces in by_name.items()}


def saved_chunks(tp: int, pp: int, dp: int) -> list[Chunk]:
    """What all ranks of a layout save between them, with its values."""
    chunks = []
    for tp_rank, pp_rank, dp_rank in itertools.product(range(tp), range(pp), range(dp)):
        ranges = owned_ranges(parameters(tp_rank, tp, DTYPE, pp_rank=pp_rank, pp=pp), dp_rank, dp)
        mine = optimizer_chunks(ranges, DTYPE)
        mine += [chunk for one in ranges for chunk in range_chunks(one, torch.empty(one.stop - one.start, dtype=DTYPE))]
        chunks += [chunk for chunk in mine if chunk.replica == 0 and chunk.tensor.numel() > 0]
    fill(chunks)
    return chunks


def loaded_chunks(tp: int, pp: int, dp: int, rank: int) -> list[Chunk]:
    """What one rank of a layout reads."""
    tp_rank, dp_rank, pp_rank = rank % tp, rank // tp % dp, rank // (tp * dp)
    infos = parameters(tp_rank, tp, DTYPE, pp_rank=pp_rank, pp=pp)
    chunks = whole_chunks(infos) + optimizer_chunks(owned_ranges(infos, dp_rank, dp), DTYPE)
    return [chunk for chunk in chunks if chunk.tensor.numel() > 0]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.sampled_from(LAYOUTS), target=st.sampled_from(LAYOUTS), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_dcp_reads_the_same_slices(
    source: tuple[int, int, int], target: tuple[int, int, int], data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder: Path = tmp_path_factory.mktemp("dcp")
    saved = saved_chunks(*source)
    dcp.save(tables(saved), checkpoint_id=folder / "theirs", no_dist=True)
    save_checkpoint(folder / "ours", 1, saved, {}, ParallelContext.single())
    tp, pp, dp = target
    rank = data.draw(st.integers(0, tp * pp * dp - 1))
    theirs, ours = loaded_chunks(*target, rank), loaded_chunks(*target, rank)
    dcp.load(tables(theirs), checkpoint_id=folder / "theirs", no_dist=True)
    CheckpointReader(folder / "ours").read_into(ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.tensor, other.tensor), f"{mine.name} at {mine.offset}"
    assert_filled(ours)
