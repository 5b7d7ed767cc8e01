"""Rotary position embedding. Half-split, as in Hugging Face's Llama, feature i turns with feature i + D/2;
interleaved, as in the paper, feature 2i with 2i + 1. The pair i has the angle i in both, and both use the same tables.
"""

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype
from megatron_aquila.kernels.rope_scaling import UNSCALED, Scaling, rope_frequencies


def rope_tables(
    positions_BS: Tensor, *, head_dim: int, base: float, dtype: torch.dtype, scaling: Scaling = UNSCALED
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(cos_SBD, sin_SBD)`` in ``compute_dtype(dtype)``, for tensors of ``dtype``.

    Feature pair i of a token at position p turns by ``p / base^(2i / head_dim)`` radians, unless ``scaling`` says
    otherwise.
    """
    assert head_dim % 2 == 0, f"rope turns pairs of features; head_dim {head_dim} is odd"
    wide = compute_dtype(dtype)
    frequencies = rope_frequencies(head_dim, base, scaling, dtype=wide, device=positions_BS.device)
    angles = positions_BS.T.to(wide).unsqueeze(-1) * frequencies
    angles_SBD = torch.cat((angles, angles), dim=-1)
    amplitude = scaling.amplitude()
    if amplitude == 1.0:
        return angles_SBD.cos(), angles_SBD.sin()
    return angles_SBD.cos() * amplitude, angles_SBD.sin() * amplitude


def apply_rope(x_SBND: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, *, interleaved: bool = False) -> Tensor:
    """Every head of ``x_SBND`` turned by its token's position; computed in the type of the tables, rounded once.

    Autograd keeps the tables, which all layers share, and nothing of ``x``.
    """
    wide = x_SBND.to(cos_SBD.dtype)
    if interleaved:
        cos, sin = (table.chunk(2, dim=-1)[0].unsqueeze(2) for table in (cos_SBD, sin_SBD))
        even, odd = wide[..., 0::2], wide[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return pairs.flatten(-2).to(x_SBND.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos_SBD.unsqueeze(2) + turned * sin_SBD.unsqueeze(2)).to(x_SBND.dtype)


def split_qkv(qkv_SBP: Tensor, *, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(q_SBND, k_SBKD, v_SBKD)``, views of a projection whose columns are [q heads; k heads; v heads]."""
    heads = torch.unflatten(qkv_SBP, -1, (num_heads + 2 * num_kv_heads, -1))
    q_SBND, k_SBKD, v_SBKD = torch.split_with_sizes(heads, [num_heads, num_kv_heads, num_kv_heads], dim=2)
    return q_SBND, k_SBKD, v_SBKD


def rope_qkv_(
    qkv_SBP: Tensor,
    cos_SBD: Tensor,
    sin_SBD: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(q_SBND, k_SBKD, v_SBKD)`` of a projection whose columns are [q heads; k heads; v heads], q and k turned.

    ``qkv_SBP`` must not be used afterwards: a fast version writes into it.
    """
    q, k, v = split_qkv(qkv_SBP, num_heads=num_heads, num_kv_heads=num_kv_heads)
    q_SBND, k_SBKD = (apply_rope(x, cos_SBD, sin_SBD, interleaved=interleaved) for x in (q, k))
    return q_SBND, k_SBKD, v.contiguous()  # a view would keep the whole projection alive until backward


def rope_qkv_triton_(
    qkv_SBP: Tensor,
    cos_SBD: Tensor,
    sin_SBD: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rope_qkv_`` by our Triton kernel: q and k are turned in place, and all three lie in the memory of ``qkv_SBP``.

    Nothing is allocated forward, and v is not copied; backward writes the three gradients into one tensor.
    """
    from megatron_aquila.kernels.triton.rope import RopeQkv

    _, q_SBND, k_SBKD, v_SBKD = RopeQkv.apply(  # type: ignore[no-untyped-call]
        qkv_SBP, cos_SBD, sin_SBD, num_heads, num_kv_heads, interleaved
    )
    return q_SBND, k_SBKD, v_SBKD
