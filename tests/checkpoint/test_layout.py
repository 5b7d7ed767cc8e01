from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.checkpoint.layout import Chunk, param_chunks, range_chunks
from megatron_aquila.checkpoint.rectangles import cover_problem
from megatron_aquila.parallel.params import FlatRange, ParamInfo
from tests.checkpoint.toy import SHAPE, SHAPES, parameters

TP = st.sampled_from([1, 2, 4])


def cut(info: ParamInfo, cuts: list[int]) -> list[FlatRange]:
    borders = sorted({0, info.param.numel(), *(cut % info.param.numel() for cut in cuts)})
    return [FlatRange(info, start, stop) for start, stop in pairwise(borders)]


@given(TP, st.lists(st.integers(0, 10**6), max_size=5))
def test_any_flat_split_covers_every_logical_tensor_exactly_once(tp: int, cuts: list[int]) -> None:
    found: dict[str, list[Chunk]] = {name: [] for name in SHAPES}
    for tp_rank in range(tp):
        for info in parameters(tp_rank, tp, torch.float32):
            for one in cut(info, cuts):
                chunks = range_chunks(one, info.param.detach().view(-1)[one.start : one.stop])
                assert len(chunks) <= 3 * len(info.parts), f"{len(chunks)} chunks for {len(info.parts)} parts"
                for chunk in chunks:
                    found[chunk.name].append(chunk)
    for name, chunks in found.items():
        saved = [chunk.rectangle for chunk in chunks if chunk.replica == 0]
        assert cover_problem(SHAPES[name], saved) is None, f"{name}: {cover_problem(SHAPES[name], saved)}"
        # The test can fail: without its last chunk, or with one replica counted, the tensor is not covered once.
        assert cover_problem(SHAPES[name], saved[:-1]) is not None
        copies = [chunk.rectangle for chunk in chunks if chunk.replica == 1]
        assert not copies or cover_problem(SHAPES[name], [*saved, *copies]) is not None


@given(TP, st.lists(st.integers(0, 10**6), max_size=5))
def test_ranges_and_whole_parameters_are_the_same_values(tp: int, cuts: list[int]) -> None:
    """Every element of a range's chunk is the element of ``param_chunks`` at the same logical place."""
    for tp_rank in range(tp):
        for info in parameters(tp_rank, tp, torch.float64):
            with torch.no_grad():
                info.param.copy_(torch.arange(info.param.numel()).view(info.param.shape))
            whole = {chunk.name: chunk for chunk in param_chunks(info)}
            for one in cut(info, cuts):
                for chunk in range_chunks(one, info.param.detach().view(-1)[one.start : one.stop], "prefix."):
                    part = whole[chunk.name.removeprefix("prefix.")]
                    assert chunk.replica == part.replica
                    assert torch.equal(chunk.tensor, part.tensor[chunk.rectangle.within(part.rectangle)])


def test_chunks_are_views() -> None:
    for info in parameters(1, 2, torch.float32):
        flat = torch.zeros(info.param.numel())
        one = FlatRange(info, 5, info.param.numel())
        for chunk in [*param_chunks(info), *range_chunks(one, flat[5:])]:
            chunk.tensor.fill_(1.0)
        real = sum(part.shape[0] for part in info.parts) * (1 if info.param.ndim == 1 else info.param.shape[1])
        assert (info.param == 1).sum() == real
        assert flat.sum() == real - 5


def test_padded_rows_are_in_no_chunk() -> None:
    rows = [parameters(tp_rank, 4, torch.float32)[0] for tp_rank in range(4)]
    assert [param_chunks(info)[0].tensor.shape[0] for info in rows] == [16, 16, 12, 0]
    assert SHAPE.vocab_size == 44
    assert range_chunks(FlatRange(rows[3], 0, 192), torch.empty(192)) == []


def test_wrong_shapes_are_our_own_mistakes() -> None:
    info = parameters(0, 2, torch.float32)[0]
    with pytest.raises(AssertionError, match=r"\(3, 12\) is not \(32, 12\)"):
        param_chunks(info, torch.empty(3, 12))
    with pytest.raises(AssertionError, match=r"range of 7 elements, values \(8,\)"):
        range_chunks(FlatRange(info, 3, 10), torch.empty(8))
