import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.kernels import attention_blocks
from megatron_aquila.kernels.attention import causal_attention, causal_attention_reference
from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.scores import Scores, alibi_slopes
from megatron_aquila.plan import attention_memory

S, B, D = 21, 2, 6
BOUNDS = (0, 5, 21, 30, 42)
DOCUMENTS = Documents(BOUNDS, torch.tensor(BOUNDS, dtype=torch.int32))


def outcome(attention, scores: Scores, documents: Documents | None, heads=(6, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    sizes = (heads[0], heads[1], heads[1])
    qkv = [torch.randn(S, B, n, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in sizes]
    o = attention(*qkv, documents, scores=scores)
    grad = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [o.detach(), *torch.autograd.grad(o, qkv, grad)]


SCORES = {
    "plain": Scores(),
    "alibi": Scores(slopes=alibi_slopes(6)),
    "clamp": Scores(clamp=0.4),
    "both": Scores(slopes=alibi_slopes(6), clamp=0.4),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
@pytest.mark.parametrize("rows", [1, 4, S])
def test_equals_the_reference_with_gradients(kind: str, documents: Documents | None, rows: int) -> None:
    with mock.patch.object(attention_blocks, "MOST_SCORES", rows * B * 6 * S):
        found = outcome(SCORE_BLOCKS, SCORES[kind], documents)
    for ours, expected in zip(found, outcome(causal_attention_reference, SCORES[kind], documents), strict=True):
        assert (ours - expected).norm() <= 1e-14 * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_shorter_types_are_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    """As torch's kernels: a hundred roundings in float32; one rounding of each result in bfloat16."""
    found = outcome(SCORE_BLOCKS, SCORES["both"], DOCUMENTS, dtype=dtype)
    for ours, expected in zip(
        found, outcome(causal_attention_reference, SCORES["both"], DOCUMENTS, dtype=dtype), strict=True
    ):
        assert ours.dtype is dtype
        assert (ours - expected).norm() <= tolerance * expected.norm()


def test_without_changes_it_is_ordinary_attention() -> None:
    def ordinary(q, k, v, documents, scores):
        return causal_attention(q, k, v, documents)

    for ours, expected in zip(
        outcome(SCORE_BLOCKS, Scores(), DOCUMENTS), outcome(ordinary, Scores(), DOCUMENTS), strict=True
    ):
        assert (ours - expected).norm() <= 1e-14 * expected.norm()


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="3 query heads, 2 of keys"):
        outcome(SCORE_BLOCKS, Scores(), None, heads=(3, 2))


def test_the_slopes_of_40_heads_are_those_of_32_and_every_other_of_64() -> None:
    """As the 13B was trained: 2^(-1/4), 2^(-2/4), ... 2^-8, and then 2^(-1/8), 2^(-3/8), ..., 2^(-15/8)."""
    slopes = alibi_slopes(40)
    expected = [2 ** (-i / 4) for i in range(1, 33)] + [2 ** (-i / 8) for i in range(1, 17, 2)]
    assert slopes == pytest.approx(expected, rel=1e-15)
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))


@given(st.integers(1, 200))
def test_there_are_as_many_slopes_as_heads_and_all_differ(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert len(slopes) == len(set(slopes)) == num_heads
    assert all(2**-8 <= slope < 1 for slope in slopes)
    assert math.log2(min(slopes)) == -8


def test_the_memory_plan_counts_the_same_scores() -> None:
    assert attention_memory.MOST_SCORES == attention_blocks.MOST_SCORES
