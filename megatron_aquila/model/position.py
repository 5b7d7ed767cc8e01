"""Where attention learns of positions: turned queries and keys, or scores that sink with distance."""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from megatron_aquila.kernels.ops import CausalAttention, Kernels, RopeQkv, ScoredAttention
from megatron_aquila.kernels.rope import rope_tables, split_qkv
from megatron_aquila.kernels.rope_scaling import Kind, Scaling
from megatron_aquila.kernels.scores import Scores, alibi_slopes
from megatron_aquila.kernels.two_range import Ranges
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.shape import ModelShape


def position_tables(shape: ModelShape, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the layers share: the rotary tables ``(cos_SBD, sin_SBD)``, empty where nothing is turned. Local."""
    if shape.position_embedding == "alibi":
        nothing = torch.empty(0, device=positions_BS.device)
        return nothing, nothing
    base, scaling = shape.stretched_rope_base, rope_scaling(shape)
    return rope_tables(positions_BS, head_dim=shape.head_dim, base=base, dtype=dtype, scaling=scaling)


def rope_scaling(shape: ModelShape) -> Scaling:
    """How the frequencies of the model's rotary positions are stretched, beside their base."""
    form = shape.rope_scaling  # ntk is another base, and two-range is attention's
    kind: Kind = "none" if form == "ntk" or form == "two-range" else form
    return Scaling(kind=kind, factor=shape.rope_factor, trained_len=shape.rope_trained_len)


def head_splitter(shape: ModelShape, kernels: Kernels) -> RopeQkv:
    """How q, k and v are taken out of their projection: q and k turned as ``shape`` says, or not. Local."""
    match shape.position_embedding:
        case "alibi":
            return _unturned
        case "rope-interleaved":
            return partial(kernels.rope_qkv, interleaved=True)
        case "rope":
            return kernels.rope_qkv


def _unturned(
    qkv_SBP: Tensor,
    cos_SBD: Tensor,
    sin_SBD: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views: attention keeps all of the projection, none of it in vain."""
    return split_qkv(qkv_SBP, num_heads=num_heads, num_kv_heads=num_kv_heads)


def attention_of(shape: ModelShape, kernels: Kernels, tp: Group) -> CausalAttention:
    """The attention of this rank's heads, with what ``shape`` does to their scores."""
    scores = rank_scores(shape, tp)
    return kernels.attention if scores is None else partial(cast(ScoredAttention, kernels.attention), scores=scores)


def two_ranges(shape: ModelShape) -> Ranges | None:
    """Which pairs of tokens are far, and how they count; None where all count alike."""
    if shape.rope_scaling != "two-range":
        return None
    return Ranges(
        threshold=shape.rope_trained_len,
        factor=shape.rope_factor,
        base=shape.rope_base,
        interleaved=shape.position_embedding == "rope-interleaved",
    )


def rank_scores(shape: ModelShape, tp: Group) -> Scores | None:
    """What is done to the scores of this rank's heads, each with its own slope; None where nothing is. Local."""
    slopes, ranges = None, two_ranges(shape)
    if shape.position_embedding == "alibi":
        num_heads = shape.num_heads // tp.size
        slopes = alibi_slopes(shape.num_heads)[tp.rank * num_heads : (tp.rank + 1) * num_heads]
    if slopes is None and shape.score_clamp is None and ranges is None:
        return None
    return Scores(slopes=slopes, clamp=shape.score_clamp, ranges=ranges)
