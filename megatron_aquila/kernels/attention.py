"""Causal self-attention with grouped heads: query head n reads key/value head ``n // (N / K)``.

Every kernel keeps documents apart where it is given them: a token then sees the earlier ones of its document only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import compute_dtype, multiplies_widened
from megatron_aquila.kernels.scores import Scores

# torch's kernels that never hold all scores; its plain one does, and is not among them
FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def causal_attention_reference(
    q_SBND: Tensor,
    k_SBKD: Tensor,
    v_SBKD: Tensor,
    documents: Documents | None = None,
    *,
    scores: Scores = Scores(),
) -> Tensor:
    """Softmax of the scaled scores of all earlier tokens and oneself, times the values: ``o_SBND``.

    Computed in ``compute_dtype`` and rounded once. Holds all S x S scores.
    """
    wide = compute_dtype(q_SBND.dtype)
    seq_len, heads_per_group = q_SBND.shape[0], _heads_per_group(q_SBND, k_SBKD)
    k_SBND = k_SBKD.to(wide).repeat_interleave(heads_per_group, dim=2)
    v_SBND = v_SBKD.to(wide).repeat_interleave(heads_per_group, dim=2)
    places = (range(seq_len),)
    scores_BNSS = scores.of(q_SBND.to(wide), k_SBND, places, places)
    hidden = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q_SBND.device).triu(1)
    if documents is not None:
        number_BS = documents.numbers_BS(q_SBND.shape[1])
        hidden = hidden | (number_BS[:, None, :, None] != number_BS[:, None, None, :])
    weights_BNSS = scores_BNSS.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights_BNSS, v_SBND).to(q_SBND.dtype)


def causal_attention(q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
    """``causal_attention_reference`` by whichever of torch's fused kernels torch prefers; an error where none fits.

    All of them sum in float32 or wider. On a CPU bfloat16 is widened first: its backward is 5 times faster so.
    Documents are attended one by one: a mask would cost the fused kernels and the S x S scores.
    """
    return _one_by_one(FUSED, q_SBND, k_SBKD, v_SBKD, documents)


def causal_attention_cudnn(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by torch's cuDNN kernel and no other; half precision on a GPU only.

    Documents are attended one by one, and cuDNN plans each length anew: a varlen kernel is better for them.
    """
    return _one_by_one((SDPBackend.CUDNN_ATTENTION,), q_SBND, k_SBKD, v_SBKD, documents)


def causal_attention_efficient(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by torch's memory-efficient kernel and no other; on a GPU, in float32 too.

    It knows no grouped heads, so that keys and values are repeated. Documents are attended one by one.
    """
    group = _heads_per_group(q_SBND, k_SBKD)
    k_SBND, v_SBND = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k_SBKD, v_SBKD))
    return _one_by_one((SDPBackend.EFFICIENT_ATTENTION,), q_SBND, k_SBND, v_SBND, documents)


def causal_attention_torch_flash(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by torch's own flash attention 2 and no other; half precision on a GPU only.

    All documents are one call of its varlen form.
    """
    if documents is None:
        return _sdpa((SDPBackend.FLASH_ATTENTION,), q_SBND, k_SBKD, v_SBKD)
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads without being told, and cannot be told
    can_be_told = "enable_gqa" in (varlen_attn.__kwdefaults__ or {})
    told: dict[str, Any] = {"enable_gqa": _heads_per_group(q_SBND, k_SBKD) > 1} if can_be_told else {}
    q, k, v = (_packed(x) for x in (q_SBND, k_SBKD, v_SBKD))
    bounds, longest = documents.bounds_device, max(documents.lengths)
    # a window of all earlier tokens and no later one is the causal mask
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **told)
    return _unpacked(_output(out), q_SBND)


def _one_by_one(
    backends: tuple[SDPBackend, ...], q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None
) -> Tensor:
    if documents is None:
        return _sdpa(backends, q_SBND, k_SBKD, v_SBKD)
    apart = zip(*(torch.split_with_sizes(_packed(x), documents.lengths) for x in (q_SBND, k_SBKD, v_SBKD)), strict=True)
    each = [_sdpa(backends, *(x.unsqueeze(1) for x in qkv)).squeeze(1) for qkv in apart]
    return _unpacked(torch.cat(each), q_SBND)


def _sdpa(backends: tuple[SDPBackend, ...], q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
    """Attention by one of ``backends``: where none of them can, torch raises, and never takes another."""
    grouped = _heads_per_group(q_SBND, k_SBKD) > 1
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBKD, v_SBKD))
    if multiplies_widened(q):
        q, k, v = (x.to(compute_dtype(x.dtype)) for x in (q, k, v))
    with sdpa_kernel(list(backends)):
        o_BNSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o_BNSD.permute(2, 0, 1, 3).to(q_SBND.dtype)


def causal_attention_flash(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by flash attention 2, the package flash_attn; half precision on a GPU only."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _flash(flash_attn_func, flash_attn_varlen_func, q_SBND, k_SBKD, v_SBKD, documents)


def causal_attention_flash_3(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by flash attention 3, flash_attn_interface; half precision on Hopper."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _flash(flash_attn_func, flash_attn_varlen_func, q_SBND, k_SBKD, v_SBKD, documents)


def causal_attention_flash_4(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by flash attention 4, flash_attn.cute; half precision on Hopper and Blackwell."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return _flash(flash_attn_func, flash_attn_varlen_func, q_SBND, k_SBKD, v_SBKD, documents)


def _flash(
    dense: Callable[..., Any],
    varlen: Callable[..., Any],
    q_SBND: Tensor,
    k_SBKD: Tensor,
    v_SBKD: Tensor,
    documents: Documents | None,
) -> Tensor:
    """The call that the flash attention packages share; ``dispatch`` has seen that they take these keywords."""
    _heads_per_group(q_SBND, k_SBKD)
    if documents is None:
        q, k, v = (x.transpose(0, 1) for x in (q_SBND, k_SBKD, v_SBKD))
        return _output(dense(q, k, v, causal=True)).transpose(0, 1)
    bounds, longest = documents.bounds_device, max(documents.lengths)
    out = varlen(
        *(_packed(x) for x in (q_SBND, k_SBKD, v_SBKD)),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
    )
    return _unpacked(_output(out), q_SBND)


def _output(result: Any) -> Tensor:
    """What a package returned, less the logarithms that some versions of flash attention add."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _packed(x_SBND: Tensor) -> Tensor:
    """All samples end to end, (B * S, N, D): what ``Documents`` counts."""
    return x_SBND.transpose(0, 1).flatten(0, 1)


def _unpacked(x: Tensor, like_SBND: Tensor) -> Tensor:
    return x.view(like_SBND.shape[1], -1, *x.shape[1:]).transpose(0, 1)


def _heads_per_group(q_SBND: Tensor, k_SBKD: Tensor) -> int:
    num_heads, num_kv_heads = q_SBND.shape[2], k_SBKD.shape[2]
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads cannot share {num_kv_heads} key/value heads"
    return num_heads // num_kv_heads
