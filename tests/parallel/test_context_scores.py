"""Scores that change with distance or are clamped, of split samples, in both ways, against the whole ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.blocks import BLOCKS_CPU
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.scores import Scores, alibi_slopes
from megatron_aquila.kernels.two_range import Ranges
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.ulysses import UlyssesAttention
from megatron_aquila.plan.sequence import shard_pieces
from tests.parallel.test_context_attention import cp_group, joined
from tests.parallel.worlds import distance, on_ranks

HEADS = 12  # whose slopes are of both kinds
SLOPES = alibi_slopes(HEADS)
RANGES = Ranges(threshold=5, factor=2.5, base=100.0)
CHANGES = {
    "alibi": Scores(slopes=SLOPES),
    "clamp": Scores(clamp=0.4),
    "alibi and clamp": Scores(slopes=SLOPES, clamp=0.4),
    "two ranges": Scores(ranges=RANGES),
    "two ranges and clamp": Scores(ranges=RANGES, clamp=0.4),
}
BOUNDS = (0, 1, 5, 22, 24, 32, 64)  # of two samples of 32 tokens
WHOLE, APART = (0, 32, 64), BOUNDS


def documents_of(bounds):
    return Documents(tuple(bounds), torch.tensor(bounds, dtype=torch.int32))


def inputs(length, kv_heads):
    """q, k, v of two whole samples and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((length, 2, heads, 8) for heads in (HEADS, kv_heads, kv_heads, HEADS))
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def sharded(size, method, kv_heads, bounds, scores):
    """Output and gradients of this rank's tokens, and which they are."""
    cp, length = cp_group(size), bounds[-1] // 2
    kernel = SCORE_BLOCKS if scores.alters else BLOCKS_CPU
    split = {
        "ring": RingAttention(cp=cp, kernel=kernel, overlap=True),
        "ulysses": UlyssesAttention(cp=cp, attention=kernel),
    }
    held = [t for piece in shard_pieces(length, cp=size, rank=cp.rank, method=method) for t in piece]
    q, k, v, grad = (x[held].requires_grad_() for x in inputs(length, kv_heads))
    o = split[method](q, k, v, documents_of(bounds), scores=scores)
    return held, [o.detach(), *torch.autograd.grad(o, (q, k, v), grad.detach())]


def sharded_all(size, method, cases):
    return [sharded(size, method, *case) for case in cases]


def expected(kv_heads, bounds, scores):
    q, k, v, grad = inputs(bounds[-1] // 2, kv_heads)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = causal_attention_reference(*leaves, documents_of(bounds), scores=scores)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


def worst(ours, theirs):
    return max(distance(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("method", "size"), [("ring", 2), ("ring", 4), ("ulysses", 2), ("ulysses", 4)])
def test_changed_scores_of_a_split_sequence_are_those_of_the_whole(method, size, pool):
    """Three key heads are copied for Ulysses, and four are not."""
    cases = [(heads, bounds, scores) for heads, bounds in ((3, APART), (4, WHOLE)) for scores in CHANGES.values()]
    by_rank = on_ranks(pool, size, sharded_all, method, cases)
    for case, parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert worst(joined(parts), expected(*case)) < 1e-14, case


@settings(max_examples=10, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(CHANGES)), size=st.sampled_from([2, 4]))
def test_any_documents_of_any_length(data, kind, size, pool):
    length = 2 * size * data.draw(st.integers(1, 6))
    ends = data.draw(st.sets(st.integers(1, 2 * length - 1), max_size=6))
    case = (2, tuple(sorted({0, length, 2 * length, *ends})), CHANGES[kind])
    assert worst(joined(on_ranks(pool, size, sharded, "ring", *case)), expected(*case)) < 1e-13


def test_the_test_can_fail(pool):
    """Slopes of the first heads on every rank of Ulysses, and distances a token longer, are far off."""
    for kind, wrong in (
        ("alibi", Scores(slopes=SLOPES[:6] * 2)),
        ("two ranges", Scores(ranges=Ranges(threshold=6, factor=2.5, base=100.0))),
    ):
        right = expected(3, APART, CHANGES[kind])
        assert worst(joined(on_ranks(pool, 2, sharded, "ulysses", 3, APART, wrong)), right) > 1e-3
