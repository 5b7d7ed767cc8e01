"""The global gradient norm: every element of every logical parameter exactly once."""

import math
from collections.abc import Iterator

from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_aquila.parallel.params import FlatRange


def counted(flat: FlatRange) -> Iterator[tuple[int, int]]:
    """The parts of ``flat`` that this rank counts, as ranges of the flattened parameter.

    Left out: what another tensor-parallel rank counts (``replica`` is not 0), and padded rows, which are in no part.
    """
    param = flat.info.param
    row = param[0].numel() if param.dim() else 1
    for part in flat.info.parts:
        begin = part.local_row * row
        end = begin + math.prod(part.shape)
        start, stop = max(begin, flat.start), min(end, flat.stop)
        if part.replica == 0 and start < stop:
            yield start, stop


def squared_norm(grads: list[Tensor]) -> Tensor:
    """Sum of squares of all elements as a float64 scalar on the device; waits for nothing."""
    return get_total_norm(grads).double().square()


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of ``norm`` are multiplied with; torch.nn.utils.clip_grad_norm_'s formula.

    1 when ``max_norm`` is 0 (no clipping) and for a norm that is not finite: whether to use such gradients at all is
    the trainer's decision.
    """
    if max_norm == 0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
