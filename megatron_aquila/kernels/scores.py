"""What some families do to attention's scores before the softmax: ALiBi, and a clamp."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The changes to the scaled scores, first the clamp, then the bias.

    ``clamp``: scores are held within plus and minus this, and one outside it gets no gradient. ``slopes``: one for each
    of the heads at hand; a head's score of a token that lies ``n`` back in its sample loses ``n`` times its slope.
    """

    slopes: tuple[float, ...] | None = None
    clamp: float | None = None

    def bias(self, rows: range, columns: range, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What is added to the scores of the queries ``rows`` with the keys ``columns``, (heads, rows, columns)."""
        if self.slopes is None:
            return None
        query, key = (torch.arange(x.start, x.stop, dtype=dtype, device=device) for x in (rows, columns))
        slopes = torch.tensor(self.slopes, dtype=dtype, device=device)
        return slopes[:, None, None] * (key[None, :] - query[:, None])


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of a model's heads: ``2^(-8 i / n)``, i from 1 to n, where n is a power of two (Press et al. 2022).

    Else those of the power of two below, and then every other one of the power above, from its first, as the authors'
    code does and models with 40 heads were trained.
    """
    below = 2 ** int(math.log2(num_heads))
    series = tuple(2.0 ** (-8 * i / below) for i in range(1, below + 1))
    between = tuple(2.0 ** (-8 * i / (2 * below)) for i in range(1, 2 * below + 1, 2))
    return series + between[: num_heads - below]
