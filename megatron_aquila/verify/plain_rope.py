"""Rotary positions of the plain Aquila, worked out pair by pair from the papers; shares no code with the kernels."""

import math

import torch
from torch import Tensor

from megatron_aquila.plan.shape import ModelShape


def plain_rotate(x_BSND: Tensor, positions_BS: Tensor, shape: ModelShape) -> Tensor:
    """Rotate pairs (i, i + D/2) by position * w_i (Su et al. 2021, half-split as in GPT-NeoX and Llama).

    Interleaved, pairs (2i, 2i + 1) by the same angles.
    """
    if shape.position_embedding == "rope-interleaved":
        halves = torch.cat((x_BSND[..., 0::2], x_BSND[..., 1::2]), dim=-1)
        turned = _rotate_halves(halves, positions_BS, shape)
        return torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)
    return _rotate_halves(x_BSND, positions_BS, shape)


def _rotate_halves(x_BSND: Tensor, positions_BS: Tensor, shape: ModelShape) -> Tensor:
    wide = torch.promote_types(x_BSND.dtype, torch.float32)
    turns = [plain_frequency(shape, pair) for pair in range(shape.head_dim // 2)]
    angles = (positions_BS.to(wide)[..., None] * torch.tensor(turns, dtype=wide, device=x_BSND.device))[:, :, None, :]
    grown = 1 + 0.1 * math.log(shape.rope_factor) if shape.rope_scaling == "yarn" else 1.0
    first, second = (grown * x_BSND.to(wide)).chunk(2, dim=-1)
    rotated = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(rotated, dim=-1).to(x_BSND.dtype)


def plain_two_range_scores(q_BSND: Tensor, k_BSND: Tensor, shape: ModelShape) -> Tensor:
    """q k^T, (B, N, S, S), of q and k that are not turned: each product by the distance that its pair counts as.

    Below T tokens apart, T and (d - T) / f from there on (after FlagAttention's piecewise attention).
    """
    halves = (x.chunk(2, dim=-1) for x in (q_BSND, k_BSND))
    if shape.position_embedding == "rope-interleaved":
        halves = ((x[..., 0::2], x[..., 1::2]) for x in (q_BSND, k_BSND))
    (q_first, q_second), (k_first, k_second) = halves
    place = torch.arange(q_BSND.shape[1], dtype=q_BSND.dtype, device=q_BSND.device)
    far = torch.clamp(place[:, None] - place - shape.rope_trained_len, min=0)
    counted = place[:, None] - place - far + far / shape.rope_factor
    scores = torch.zeros((), dtype=q_BSND.dtype, device=q_BSND.device)
    for pair in range(shape.head_dim // 2):
        angle = counted * plain_frequency(shape, pair)
        a, b, c, d = (x[..., pair].transpose(1, 2) for x in (q_first, q_second, k_first, k_second))
        along = a[..., :, None] * c[..., None, :] + b[..., :, None] * d[..., None, :]
        across = a[..., :, None] * d[..., None, :] - b[..., :, None] * c[..., None, :]
        scores = scores + along * angle.cos() + across * angle.sin()
    return scores


def plain_frequency(shape: ModelShape, pair: int) -> float:
    """Radians that a feature pair turns by from one position to the next, stretched as ``shape`` says.

    base^(-2i/D), and of it: linear, Chen et al. 2023; ntk, bloc97 2023; yarn, Peng et al. 2023, eq. 17 to 23, with
    whole numbers of pairs as ends of its ramp; llama3, as Llama 3.1 publishes it.
    """
    base, width, factor, length = shape.rope_base, shape.head_dim, shape.rope_factor, shape.rope_trained_len
    turn = math.pow(base, -2 * pair / width)
    turns_in_length = length * turn / math.tau
    match shape.rope_scaling:
        case "none" | "two-range":
            return turn
        case "linear":
            return turn / factor
        case "ntk":
            return math.pow(base * math.pow(factor, width / (width - 2)), -2 * pair / width)
        case "yarn":
            ends = [width * math.log(length / (n * math.tau)) / (2 * math.log(base)) for n in (32, 1)]
            start, stop = max(0, math.floor(ends[0])), min(width - 1, math.ceil(ends[1]))
            share = float(pair > start) if start == stop else min(1.0, max(0.0, (pair - start) / (stop - start)))
            return turn * (share / factor + 1 - share)
        case "llama3":
            share = min(1.0, max(0.0, (turns_in_length - 1) / 3))
            return turn * (share + (1 - share) / factor)
