"""What some families do to attention's scores before the softmax: two ranges of distances, a clamp, and ALiBi."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_aquila.kernels.parts import Places
from megatron_aquila.kernels.two_range import Ranges, places_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The changes to the scaled scores, first which pairs are far, then the clamp, then the bias.

    ``ranges``: far pairs are scored by q and k that are turned further. ``clamp``: scores are held within plus and
    minus this, and one outside it gets no gradient. ``slopes``: one for each of the heads at hand; a head's score of a
    token that lies ``n`` back in its sample loses ``n`` times its slope.
    """

    slopes: tuple[float, ...] | None = None
    clamp: float | None = None
    ranges: Ranges | None = None

    @property
    def alters(self) -> bool:
        """Whether scores are altered once they are taken, which no fused kernel does; ranges alone need none to."""
        return self.slopes is not None or self.clamp is not None

    def share(self, rank: int, size: int) -> "Scores":
        """What is done to the scores of the ``rank``-th of ``size`` equal shares of these heads."""
        if self.slopes is None:
            return self
        num_heads = len(self.slopes) // size
        return replace(self, slopes=self.slopes[rank * num_heads : (rank + 1) * num_heads])

    def slopes_N11(self, like: Tensor) -> Tensor:
        """The slopes in the type of ``like``: times how far a key lies after the query, they are added to a score."""
        assert self.slopes is not None, f"no slopes: {self}"
        # out of pinned memory, as the host would wait else for all that the GPU has to do
        held = torch.tensor(self.slopes, dtype=like.dtype, pin_memory=like.is_cuda)
        return held.to(like.device, non_blocking=True)[:, None, None]

    def of(
        self, q_SBND: Tensor, k_TBND: Tensor, queries: Places, keys: Places, *, k_far_TBND: Tensor | None = None
    ) -> Tensor:
        """All scores_BNST of q and k, of as many heads, in their type. ``k_far_TBND``: of k, where it is at hand."""
        found: Tensor = torch.einsum("sbnd,tbnd->bnst", q_SBND, k_TBND)
        queries_S, keys_T = (places_of(places, q_SBND) for places in (queries, keys))
        if self.ranges is not None:
            k_far = self.ranges.far_k(k_TBND, keys) if k_far_TBND is None else k_far_TBND
            far = torch.einsum("sbnd,tbnd->bnst", self.ranges.far_q(q_SBND, queries), k_far)
            found = torch.where(queries_S[:, None] - keys_T < self.ranges.threshold, found, far)
        found = found * q_SBND.shape[-1] ** -0.5
        if self.clamp is not None:
            found = found.clamp(-self.clamp, self.clamp)
        if self.slopes is not None:
            found = found + self.slopes_N11(found) * (keys_T - queries_S[:, None])
        return found


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of a model's heads: ``2^(-8 i / n)``, i from 1 to n, where n is a power of two (Press et al. 2022).

    Else those of the power of two below, and then every other one of the power above, from its first, as the authors'
    code does and models with 40 heads were trained.
    """
    below = 2 ** int(math.log2(num_heads))
    series = tuple(2.0 ** (-8 * i / below) for i in range(1, below + 1))
    between = tuple(2.0 ** (-8 * i / (2 * below)) for i in range(1, 2 * below + 1, 2))
    return series + between[: num_heads - below]
