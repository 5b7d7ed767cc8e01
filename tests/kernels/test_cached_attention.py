from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aquila.kernels import cached_attention as module
from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.cached_attention import cached_attention, cached_attention_reference, cached_part
from megatron_aquila.kernels.parts import merged_parts
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.kernels.two_range import Ranges

S, T, B, N, K, D = 3, 7, 2, 4, 2, 8


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(T, B, heads, D, dtype=torch.float64).to(dtype) for heads in (N, K, K))  # type: ignore[return-value]


@pytest.mark.parametrize("function", [cached_attention, cached_attention_reference])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_last_rows_of_causal_attention(function, dtype: torch.dtype, bound: float) -> None:
    q, k, v = tensors(dtype)
    expected = causal_attention_reference(q, k, v)
    for size in (1, S, T):
        torch.testing.assert_close(function(q[-size:], k, v), expected[-size:], rtol=0, atol=bound)


@pytest.mark.parametrize("function", [cached_attention, cached_attention_reference])
def test_what_is_not_visible_has_no_part(function) -> None:
    q, k, v = tensors(torch.float64)
    visible = torch.ones(B, S, T, dtype=torch.bool).tril(T - S)
    visible[1, :, :4] = False
    found = function(q[-S:], k, v, visible)
    expected = causal_attention_reference(q[4:], k[4:], v[4:])[:, 1]
    torch.testing.assert_close(found[:, 1], expected, rtol=0, atol=1e-14)
    assert (function(q[-S:], k, v)[:, 1] - expected).abs().max() > 1e-3, "the test can fail"


@pytest.mark.parametrize("scores", [Scores(), Scores(slopes=(0.5, 0.25, 0.125, 0.0625)), Scores(clamp=0.5)], ids=str)
def test_parts_of_any_keys_make_the_whole(scores: Scores) -> None:
    q, k, v = tensors(torch.float64)
    visible = torch.ones(B, S, T, dtype=torch.bool).tril(T - S)
    visible[1, :, :4] = False
    whole = cached_attention_reference(q[-S:], k, v, visible, scores=scores)
    parts = []
    for runs in ((range(2), range(5, 7)), (range(2, 4),), (range(4, 5),), (range(7, 7),)):  # one part is of no keys
        held = [place for run in runs for place in run]
        seen, places = visible[:, :, held], (range(T - S, T),)
        parts.append(cached_part(q[-S:], k[held], v[held], seen, queries=places, keys=runs, scores=scores))
    assert parts[1][1][:, 1].isneginf().all(), "of these the second row sees none"
    outs, sums = (torch.stack(of_parts) for of_parts in zip(*parts, strict=True))
    torch.testing.assert_close(merged_parts(outs, sums), whole, rtol=0, atol=1e-14)
    assert (merged_parts(outs[:3], sums[:3] * 1.1) - whole).abs().max() > 1e-3, "the test can fail"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **({} if kwargs is None else kwargs))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize(
    "scores",
    [
        Scores(),
        Scores(slopes=(0.5, 0.25, 0.125, 0.0625), clamp=0.5),
        Scores(ranges=Ranges(threshold=3, factor=2.5, base=100.0)),
    ],
    ids=["plain", "biased and clamped", "near and far"],
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_blocks_of_queries_are_the_whole_and_bound_what_is_held(scores: Scores, is_padded: bool) -> None:
    tokens, new, rows = 96, 70, 2 * D
    q, k, v = (torch.randn(tokens, B, heads, D, dtype=torch.float64) for heads in (N, K, K))
    visible = torch.ones(B, new, tokens, dtype=torch.bool).tril(tokens - new)
    visible[1, :, :20] = False

    def largest() -> tuple[torch.Tensor, int]:
        with Largest() as made:
            found = cached_attention_reference(q[-new:], k, v, visible if is_padded else None, scores=scores)
        return found, made.elements

    whole, unbounded = largest()
    with mock.patch.object(module, "MOST_SCORES", (rows + 1) * B * N * tokens - 1):
        blocks, bounded = largest()
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-14)
    assert unbounded == B * N * new * tokens
    assert bounded == B * N * rows * tokens
