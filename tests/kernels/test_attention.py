import inspect
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.attention.varlen import varlen_attn

from megatron_aquila.kernels.attention import (
    causal_attention,
    causal_attention_cudnn,
    causal_attention_efficient,
    causal_attention_flash,
    causal_attention_flash_3,
    causal_attention_flash_4,
    causal_attention_reference,
    causal_attention_torch_flash,
)
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


def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The packages run on GPUs only: a stand-in with what their signatures share checks the layout of the call."""
    assert causal
    return causal_attention_reference(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
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


@pytest.mark.parametrize("adds_logarithms", [False, True])  # of the softmax's sums: some versions return them, too
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("flash_attn", causal_attention_flash),
        ("flash_attn_interface", causal_attention_flash_3),
        ("flash_attn.cute", causal_attention_flash_4),
    ],
)
def test_flash_attention_is_called_batch_first(
    name: str, kernel, adds_logarithms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(function):
        return (lambda *args, **kwargs: (function(*args, **kwargs), None)) if adds_logarithms else function

    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    module = types.ModuleType(name)
    vars(module).update(flash_attn_func=add(flash_attn_func), flash_attn_varlen_func=add(flash_attn_varlen_func))
    monkeypatch.setitem(sys.modules, name, module)
    qkv = inputs(4, 2, torch.float64)
    assert torch.equal(kernel(*qkv), causal_attention_reference(*qkv))
    apart, expected = (attention(*qkv, DOCUMENTS) for attention in (kernel, causal_attention_reference))
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("can_be_told", [False, True])  # torch 2.11 has no enable_gqa
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2)])
def test_torchs_flash_attention_takes_all_documents_in_one_call(
    num_heads: int, num_kv_heads: int, can_be_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        calls.append(window_size)
        lengths = {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
        bounds = {"cu_seqlens_q": cu_seq_q, "cu_seqlens_k": cu_seq_k}
        return flash_attn_varlen_func(query, key, value, **bounds, **lengths, causal=True)

    def varlen_2_13(query, key, value, *bounds, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (num_heads > num_kv_heads)
        return varlen_2_11(query, key, value, *bounds, window_size=window_size)

    stand_in = varlen_2_13 if can_be_told else varlen_2_11
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    qkv = inputs(num_heads, num_kv_heads, torch.float64)
    apart, expected = (
        attention(*qkv, DOCUMENTS) for attention in (causal_attention_torch_flash, causal_attention_reference)
    )
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-14)
    assert calls == [(-1, 0)]


def test_torchs_varlen_attention_is_as_the_stand_ins_say() -> None:
    assert [*inspect.signature(varlen_attn).parameters][:7] == (
        ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    )
    assert varlen_attn.__kwdefaults__["window_size"] == (-1, -1)


@pytest.mark.parametrize(
    ("attention", "backends"),
    [
        (causal_attention, {SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION}),
        (causal_attention_cudnn, {SDPBackend.CUDNN_ATTENTION}),
        (causal_attention_torch_flash, {SDPBackend.FLASH_ATTENTION}),
        (causal_attention_efficient, {SDPBackend.EFFICIENT_ATTENTION}),
    ],
)
def test_torch_may_take_no_other_backend(attention, backends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all the plain one. The reference stands in for the backends that only GPUs have."""
    allowed = []

    def sdpa(q, k, v, *, is_causal: bool, enable_gqa: bool) -> torch.Tensor:
        allowed.append(set(_cur_sdpa_kernel_backends()))
        assert is_causal
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert not (enable_gqa and attention is causal_attention_efficient), "it knows no grouped heads"
        return causal_attention_reference(*(x.permute(2, 0, 1, 3) for x in (q, k, v))).permute(1, 2, 0, 3)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", sdpa)
    qkv = inputs(4, 2, torch.float64)
    for ours, reference in zip(
        with_gradients(attention, qkv), with_gradients(causal_attention_reference, qkv), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-13)
    assert allowed == [backends]


@pytest.mark.parametrize("attention", [causal_attention_cudnn, causal_attention_efficient])
def test_a_backend_that_cannot_run_raises(attention) -> None:
    with pytest.raises(RuntimeError, match="No viable backend"):
        attention(*inputs(4, 2, torch.float32))


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
