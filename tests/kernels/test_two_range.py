"""Near pairs count as they lie, far ones closer; every pair once, gradients included."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.blocks import BLOCKS_CPU, BLOCKS_REFERENCE
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.parts import Meeting
from megatron_aquila.kernels.rope import apply_rope, rope_tables
from megatron_aquila.kernels.scores import Scores, alibi_slopes
from megatron_aquila.kernels.two_range import Ranges, pieces

BOUNDS = (0, 1, 5, 13, 26)
DOCUMENTS = Documents(BOUNDS, torch.tensor(BOUNDS, dtype=torch.int32))
RANGES = Ranges(threshold=3, factor=2.5, base=100.0)
LENGTH, SAMPLES, WIDTH = 13, 2, 8


def qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((LENGTH, SAMPLES, heads, WIDTH) for heads in (6, 2, 2))
    return [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def of(ranges, attention=causal_attention_reference, **changes):
    """Attention whose far pairs count as ``ranges`` say."""
    return partial(attention, scores=Scores(ranges=ranges, **changes))


def turned(attention, *, interleaved=False, offset=0):
    """With q and k turned to their places, as the model gives them."""

    def attend(q, k, v, documents):
        positions_BS = offset + torch.arange(LENGTH).expand(SAMPLES, -1)
        tables = rope_tables(positions_BS, head_dim=WIDTH, base=RANGES.base, dtype=q.dtype)
        q, k = (apply_rope(x, *tables, interleaved=interleaved) for x in (q, k))
        return attention(q, k, v, documents)

    return attend


def by_distances(ranges):
    """Each score from the distance that its pair counts as, pair of features by pair: no position is turned."""

    def attend(q, k, v, documents):
        scores = q.new_full((SAMPLES, 6, LENGTH, LENGTH), -torch.inf)
        numbers = torch.zeros(SAMPLES, LENGTH) if documents is None else documents.numbers_BS(SAMPLES)
        for sample in range(SAMPLES):
            for row in range(LENGTH):
                for column in range(row + 1):
                    if numbers[sample, row] != numbers[sample, column]:
                        continue
                    apart = float(row - column)
                    if apart >= ranges.threshold:
                        apart = ranges.threshold + (apart - ranges.threshold) / ranges.factor
                    for head in range(6):
                        a, b = q[row, sample, head], k[column, sample, head // 3]
                        scores[sample, head, row, column] = turned_product(a, b, apart, ranges) / math.sqrt(WIDTH)
        return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v.repeat_interleave(3, dim=2))

    return attend


def turned_product(a, b, apart, ranges):
    half = WIDTH // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if ranges.interleaved else (slice(half), slice(half, None))
    angle = apart * ranges.base ** (-torch.arange(half, dtype=a.dtype) * 2 / WIDTH)
    along = a[first] * b[first] + a[second] * b[second]
    across = a[first] * b[second] - a[second] * b[first]
    return (along * angle.cos() + across * angle.sin()).sum()


def outcome(attend, tensors, documents):
    o = attend(*tensors, documents)
    along = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, tensors, along)]


def apart(ours, theirs):
    return max(((a.double() - b.double()).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_scores_are_those_of_the_distances(documents, interleaved):
    ranges = replace(RANGES, interleaved=interleaved)
    expected = outcome(by_distances(ranges), qkv(), documents)

    def ours(used, offset=0):
        return outcome(turned(of(used), interleaved=interleaved, offset=offset), qkv(), documents)

    assert apart(ours(ranges), expected) < 1e-13
    assert apart(ours(ranges, offset=7), expected) < 1e-13
    assert apart(ours(replace(ranges, threshold=4)), expected) > 1e-3
    assert apart(ours(replace(ranges, factor=2.4)), expected) > 1e-3


@pytest.mark.parametrize("threshold", [1, 2, 3, 5, 12, 13, 20])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("kernel", [BLOCKS_REFERENCE, BLOCKS_CPU, SCORE_BLOCKS], ids=["reference", "cpu", "scores"])
def test_pieces_make_up_the_whole(kernel, documents, threshold):
    ranges = replace(RANGES, threshold=threshold)
    expected = outcome(of(ranges), qkv(), documents)
    assert apart(outcome(of(ranges, kernel), qkv(), documents), expected) < 1e-14
    off_by_one = of(replace(ranges, threshold=threshold + 1), kernel)
    if threshold < 5:
        assert apart(outcome(off_by_one, qkv(), documents), expected) > 1e-3


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_far_pairs_are_clamped_too(documents):
    clamped = partial(of, RANGES, clamp=0.4)
    expected = outcome(clamped(), qkv(), documents)
    assert apart(outcome(clamped(SCORE_BLOCKS), qkv(), documents), expected) < 1e-14
    assert apart(outcome(of(RANGES), qkv(), documents), expected) > 1e-2
    with pytest.raises(AssertionError, match="gives no scores to alter"):
        clamped(BLOCKS_CPU)(*qkv())
    with pytest.raises(AssertionError, match="nothing turns"):
        SCORE_BLOCKS(*qkv(), scores=Scores(slopes=alibi_slopes(6), ranges=RANGES))


def test_bfloat16_is_merged_in_float32():
    tensors = qkv(torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = outcome(of(RANGES), wide, None)
    ours = outcome(of(RANGES, BLOCKS_CPU), tensors, None)
    assert all(x.dtype is torch.bfloat16 for x in ours)
    assert apart(ours, expected) < 2**-7  # far q and k are rounded once more


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 9), length=st.integers(1, 40), threshold=st.integers(1, 45))
def test_every_pair_is_in_one_piece(start, length, threshold):
    """A document, of one run of tokens."""
    whole = (range(start, start + length),)
    assert_met(Meeting(is_causal=True, queries=whole, keys=whole), threshold)


@settings(max_examples=100, deadline=None)
@given(bounds=st.lists(st.integers(0, 30), min_size=4, max_size=4, unique=True), threshold=st.integers(1, 32))
def test_every_pair_of_a_shard_is_in_one_piece(bounds, threshold):
    """A head and a tail among themselves, and all of an earlier one or another's head or both for queries that wait."""
    a, b, c, d = sorted(bounds)
    shard = (range(a, b), range(c, d))
    assert_met(Meeting(is_causal=True, queries=shard, keys=shard), threshold)
    assert_met(Meeting(is_causal=False, queries=(range(b, c), range(c, d)), keys=(range(a, b),)), threshold)
    assert_met(Meeting(is_causal=False, queries=(range(c, d),), keys=(range(a, a + 1), range(a + 1, b))), threshold)


def assert_met(meeting, threshold):
    queries, all_keys = ([place for run in runs for place in run] for runs in (meeting.queries, meeting.keys))
    seen = {}
    for piece in pieces(meeting, threshold):
        rows, columns = queries[piece.queries], all_keys[piece.keys]
        assert rows
        assert columns
        if piece.is_flipped:
            rows, columns = rows[::-1], columns[::-1]
        assert not piece.is_causal or len(rows) == len(columns)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if j <= i or not piece.is_causal:
                    assert (row, column) not in seen
                    seen[row, column] = piece.is_far
    assert seen == {(row, column): row - column >= threshold for row in queries for column in all_keys if column <= row}
