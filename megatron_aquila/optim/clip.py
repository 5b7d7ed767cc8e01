"""The global gradient norm, every element of every logical parameter exactly once, and what follows from it.

All of it stays on the device: nothing here waits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_aquila.optim.groups import Piece
from megatron_aquila.parallel.params import FlatRange

BLOCK = 2**18  # elements of a sum on a CPU, which adds one after the other: of 10 million, 4 in 10,000 would be lost


@dataclass(frozen=True, slots=True)
class Clip:
    """How a step's gradients are to be used; every rank's is the same. 0-dim tensors on the device.

    ``norm``: float64, of the gradients without the loss scale, before clipping. ``factor``: float64, what they are
    multiplied with where they are used. ``applies``: bool; where it is False they are not used: their norm is not
    finite, or whoever looks at them refuses them.
    """

    norm: Tensor
    factor: Tensor
    applies: Tensor

    @classmethod
    def at(cls, scaled_norm: Tensor, max_norm: float, *, loss_scale: float = 1.0) -> "Clip":
        """For gradients of ``scaled_norm``, to be divided by ``loss_scale`` and clipped to ``max_norm``; 0: unclipped.

        torch.nn.utils.clip_grad_norm_'s formula.
        """
        norm = scaled_norm / loss_scale
        factor = torch.ones_like(norm)
        if max_norm > 0:
            factor = (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
        return cls(norm, factor / loss_scale, norm.isfinite())


def counted(flat: FlatRange) -> Iterator[tuple[int, int]]:
    """The parts of ``flat`` that this rank counts, as ranges of the flattened parameter.

    Left out: what another tensor-parallel rank counts (``replica`` is not 0), and padded rows, which are in no part.
    """
    param = flat.info.param
    row = math.prod(param.shape[1:])
    for part in flat.info.parts:
        begin = part.local_row * row
        end = begin + math.prod(part.shape)
        start, stop = max(begin, flat.start), min(end, flat.stop)
        if part.replica == 0 and start < stop:
            yield start, stop


def counted_spans(pieces: Sequence[Piece]) -> list[slice]:
    """What of a shard this rank counts, in as few ranges as can be: ``pieces`` are all that lies in it, in order.

    The padding between two parameters is zero, so it is counted where that joins two ranges.
    """
    spans: list[slice] = []
    is_joined = False  # whether nothing but padding has followed the last span
    for piece in pieces:
        to_shard, at = piece.start - piece.flat.start, piece.flat.start
        for start, stop in counted(piece.flat):
            begin = spans.pop().start if is_joined and start == at else start + to_shard
            spans.append(slice(begin, stop + to_shard))
            is_joined, at = True, stop
        is_joined = is_joined and at == piece.flat.stop
    return spans


def squared_norm(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements as a float64 scalar on ``device``, where they are."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)  # all that this rank has is counted elsewhere
    if device.type == "cpu":
        grads = [block for grad in grads for block in torch.split(grad, BLOCK)]
    return get_total_norm(grads).double().square()
