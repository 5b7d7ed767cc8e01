"""Causal self-attention with grouped heads: query head n reads key/value head ``n // (N / K)``.

Every kernel keeps documents apart where it is given them: a token then sees the earlier ones of its document only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import compute_dtype, multiplies_widened


def causal_attention_reference(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """Softmax of the scaled scores of all earlier tokens and oneself, times the values: ``o_SBND``.

    Computed in ``compute_dtype`` and rounded once. Holds all S x S scores.
    """
    wide = compute_dtype(q_SBND.dtype)
    seq_len, heads_per_group = q_SBND.shape[0], _heads_per_group(q_SBND, k_SBKD)
    k_SBND = k_SBKD.to(wide).repeat_interleave(heads_per_group, dim=2)
    v_SBND = v_SBKD.to(wide).repeat_interleave(heads_per_group, dim=2)
    scores_BNSS = torch.einsum("sbnd,tbnd->bnst", q_SBND.to(wide), k_SBND) * q_SBND.shape[-1] ** -0.5
    hidden = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q_SBND.device).triu(1)
    if documents is not None:
        number_BS = documents.numbers_BS(q_SBND.shape[1])
        hidden = hidden | (number_BS[:, None, :, None] != number_BS[:, None, None, :])
    weights_BNSS = scores_BNSS.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights_BNSS, v_SBND).to(q_SBND.dtype)


def causal_attention(q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
    """``causal_attention_reference`` by torch's scaled_dot_product_attention, which picks flash, cuDNN or plain itself.

    All of them sum in float32 or wider. On a CPU bfloat16 is widened first: its backward is 5 times faster so. On a GPU
    float32 with grouped heads has only the plain one, which holds all S x S scores: use it for small checks.

    Documents are attended one by one: a mask would cost the flash kernels and the S x S scores.
    """
    if documents is None:
        return _sdpa(q_SBND, k_SBKD, v_SBKD)
    apart = zip(*(torch.split_with_sizes(_packed(x), documents.lengths) for x in (q_SBND, k_SBKD, v_SBKD)), strict=True)
    return _unpacked(torch.cat([_sdpa(*(x.unsqueeze(1) for x in qkv)).squeeze(1) for qkv in apart]), q_SBND)


def _sdpa(q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
    grouped = _heads_per_group(q_SBND, k_SBKD) > 1
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBKD, v_SBKD))
    if multiplies_widened(q):
        q, k, v = (x.to(compute_dtype(x.dtype)) for x in (q, k, v))
    o_BNSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o_BNSD.permute(2, 0, 1, 3).to(q_SBND.dtype)


def causal_attention_flash(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """``causal_attention_reference`` by the optional package flash_attn; half precision on a GPU only."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    _heads_per_group(q_SBND, k_SBKD)
    if documents is not None:
        bounds, longest = documents.bounds_device, max(documents.lengths)
        packed = (_packed(x) for x in (q_SBND, k_SBKD, v_SBKD))
        return _unpacked(flash_attn_varlen_func(*packed, bounds, bounds, longest, longest, causal=True), q_SBND)
    q, k, v = (x.transpose(0, 1) for x in (q_SBND, k_SBKD, v_SBKD))
    o_BSND: Tensor = flash_attn_func(q, k, v, causal=True)
    return o_BSND.transpose(0, 1)


def _packed(x_SBND: Tensor) -> Tensor:
    """All samples end to end, (B * S, N, D): what ``Documents`` counts."""
    return x_SBND.transpose(0, 1).flatten(0, 1)


def _unpacked(x: Tensor, like_SBND: Tensor) -> Tensor:
    return x.view(like_SBND.shape[1], -1, *x.shape[1:]).transpose(0, 1)


def _heads_per_group(q_SBND: Tensor, k_SBKD: Tensor) -> int:
    num_heads, num_kv_heads = q_SBND.shape[2], k_SBKD.shape[2]
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads cannot share {num_kv_heads} key/value heads"
    return num_heads // num_kv_heads
