"""Rotary position embedding, half-split as in Hugging Face's Llama: feature i turns with feature i + D/2."""

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype


def rope_tables(positions_BS: Tensor, *, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(cos_SBD, sin_SBD)`` in ``compute_dtype(dtype)``, for tensors of ``dtype``.

    Feature pair i of a token at position p turns by ``p / base^(2i / head_dim)`` radians.
    """
    assert head_dim % 2 == 0, f"rope turns pairs of features; head_dim {head_dim} is odd"
    wide = compute_dtype(dtype)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions_BS.device) / head_dim
    angles = positions_BS.T.to(wide).unsqueeze(-1) * (1.0 / base**exponents)
    angles_SBD = torch.cat((angles, angles), dim=-1)
    return angles_SBD.cos(), angles_SBD.sin()


def apply_rope(x_SBND: Tensor, cos_SBD: Tensor, sin_SBD: Tensor) -> Tensor:
    """Every head of ``x_SBND`` turned by its token's position; computed in the type of the tables, rounded once.

    Autograd keeps the tables, which all layers share, and nothing of ``x``.
    """
    wide = x_SBND.to(cos_SBD.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos_SBD.unsqueeze(2) + turned * sin_SBD.unsqueeze(2)).to(x_SBND.dtype)
