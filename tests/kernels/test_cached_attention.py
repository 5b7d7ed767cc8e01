import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.cached_attention import cached_attention, cached_attention_reference

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
