import sys
import types

import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention, causal_attention_flash, causal_attention_reference

S, B, D = 33, 2, 8  # an odd length: blocks of a fast kernel do not fit


def inputs(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(S, B, n, D, dtype=dtype, requires_grad=True) for n in (num_heads, num_kv_heads, num_kv_heads)]


def with_gradients(attention, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    o = attention(*qkv)
    torch.manual_seed(1)
    return [o, *torch.autograd.grad(o, qkv, torch.randn(o.shape, dtype=o.dtype))]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    # float64, float32: softmax over at most 33 tokens, a hundred roundings; bfloat16: one rounding of each result
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)],
)
def test_equals_the_reference_with_gradients(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = inputs(num_heads, num_kv_heads, dtype)
    for ours, reference in zip(
        with_gradients(causal_attention, qkv), with_gradients(causal_attention_reference, qkv), strict=True
    ):
        assert ours.dtype is dtype
        assert ours.shape == reference.shape
        assert (ours - reference).norm() <= tolerance * reference.norm()


def test_heads_in_the_wrong_group_would_show() -> None:
    q, k, v = inputs(4, 2, torch.float64)
    right = causal_attention_reference(q, k, v)
    strided = causal_attention_reference(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))  # head n reads n mod K
    assert (strided - right).norm() > 1e-13 * right.norm()
    by_hand = torch.cat(
        [
            causal_attention_reference(q[:, :, 2 * i : 2 * i + 2], k[:, :, i : i + 1], v[:, :, i : i + 1])
            for i in (0, 1)
        ],
        2,
    )
    torch.testing.assert_close(by_hand, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("attention", [causal_attention, causal_attention_reference])
def test_no_token_sees_a_later_one(attention) -> None:
    q, k, v = inputs(4, 2, torch.float64)
    grads = torch.autograd.grad(attention(q, k, v)[:10].square().sum(), (k, v))
    assert all(grad[:10].abs().amax(dim=(1, 2, 3)).gt(0).all() for grad in grads[1:])
    assert all((grad[10:] == 0).all() for grad in grads)


@pytest.mark.parametrize("attention", [causal_attention, causal_attention_reference])
def test_heads_that_do_not_divide_are_refused(attention) -> None:
    with pytest.raises(AssertionError, match="3 query heads cannot share 2"):
        attention(*inputs(3, 2, torch.float32))


def test_flash_attn_is_called_batch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package runs on GPUs only; a stand-in with its documented signature checks the layout of the call."""

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        assert causal
        return causal_attention_reference(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    qkv = inputs(4, 2, torch.float64)
    assert torch.equal(causal_attention_flash(*qkv), causal_attention_reference(*qkv))
