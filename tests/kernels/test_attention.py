import sys
import types

import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention, causal_attention_flash, causal_attention_reference
from megatron_aquila.kernels.documents import Documents

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

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool = False,
    ) -> torch.Tensor:
        assert causal
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        pieces = [x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)]
        alone = (causal_attention_reference(*(x[:, None] for x in qkv))[:, 0] for qkv in zip(*pieces, strict=True))
        return torch.cat(list(alone))

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    qkv = inputs(4, 2, torch.float64)
    assert torch.equal(causal_attention_flash(*qkv), causal_attention_reference(*qkv))
    apart, expected = (kernel(*qkv, DOCUMENTS) for kernel in (causal_attention_flash, causal_attention_reference))
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-14)


def documents(*bounds: int) -> Documents:
    return Documents(bounds, torch.tensor(bounds, dtype=torch.int32))


DOCUMENTS = documents(0, 7, 8, S, S + 20, 2 * S)  # of one token, too; each sample has its own


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2)])
def test_documents_are_kept_apart_as_by_the_reference(num_heads: int, num_kv_heads: int) -> None:
    qkv = inputs(num_heads, num_kv_heads, torch.float64)
    ours, reference, unmasked = (
        with_gradients(attention, qkv)
        for attention in (
            lambda *qkv: causal_attention(*qkv, DOCUMENTS),
            lambda *qkv: causal_attention_reference(*qkv, DOCUMENTS),
            causal_attention,
        )
    )
    for one, other, plain in zip(ours, reference, unmasked, strict=True):
        assert (one - other).norm() <= 1e-14 * other.norm()
        assert (one - plain).norm() > 1e-2 * plain.norm(), "the mask would not matter"


@pytest.mark.parametrize("attention", [causal_attention, causal_attention_reference])
def test_samples_of_one_document_are_as_without_masks(attention) -> None:
    qkv = inputs(4, 2, torch.float64)
    torch.testing.assert_close(attention(*qkv, documents(0, S, 2 * S)), attention(*qkv), rtol=0, atol=1e-14)


def test_documents_are_numbered_and_measured() -> None:
    found = documents(0, 2, 3, 4, 8)
    assert found.lengths == [2, 1, 1, 4]
    assert found.numbers_BS(2).tolist() == [[1, 1, 2, 3], [4, 4, 4, 4]]
