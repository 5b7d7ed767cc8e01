"""Which rank is slow? The time each spends on its own, waits for others left out, compared now and then."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

import torch

from megatron_aquila.parallel.collectives import all_gather
from megatron_aquila.parallel.context import ParallelContext

SLOWER = 1.25  # times the median, from which a rank is worth a line
SIGMAS = 6.0  # and so many robust standard deviations above it
MAD_TO_SIGMA = 1.4826  # of a normal distribution: its standard deviation by its median absolute deviation


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Seconds a step that ranks spent on their own: the slowest, those it is compared with, and who is slow."""

    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    slow: tuple[int, ...]

    def __str__(self) -> str:
        named = ", ".join(map(str, self.slow))
        return (
            f"SLOW: rank{'' if len(self.slow) == 1 else 's'} {named}: rank {self.slowest_rank} takes "
            f"{self.slowest_seconds:.3f} s a step of its own, its peers' median is {self.median_seconds:.3f} s"
        )


class Stragglers:
    """Measures this rank's steps and, every ``interval`` steps (0: never), compares them with the others'.

    A rank's own time is that of its host less its waits for transfers, as breadcrumbs count them. On a GPU the host
    waits for the device, which waits for other devices: there only a slow host or a slow disk shows.
    """

    def __init__(self, ctx: ParallelContext, *, interval: int) -> None:
        self._ctx, self._interval = ctx, interval
        self._own, self._steps = 0.0, 0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """The body is a step."""
        began, waited = time.perf_counter(), self._ctx.trail.waited
        yield
        self._own += time.perf_counter() - began - (self._ctx.trail.waited - waited)
        self._steps += 1

    def after(self, step: int) -> Comparison | None:
        """Compare where it is due. Communicates: one all-gather of a number over the hosts' world."""
        ctx = self._ctx
        if self._interval == 0 or step % self._interval or ctx.world.size == 1:
            return None
        mine = torch.tensor([self._own / max(1, self._steps)], dtype=torch.float64)
        self._own, self._steps = 0.0, 0
        stages = [ctx.grid.coords(rank)["pp"] for rank in ctx.world.ranks]
        return compare(all_gather(mine, ctx.host_world).tolist(), stages)


def compare(seconds: Sequence[float], stages: Sequence[int]) -> Comparison:
    """Each rank's seconds with those of the same pipeline rank, whose work is the same; of fewer than three, with all.

    Slow is a rank above ``SLOWER`` medians and ``SIGMAS`` robust deviations: one slow rank moves neither.
    """
    slow, excess = [], {}
    for rank, own in enumerate(seconds):
        peers = [other for other, stage in zip(seconds, stages, strict=True) if stage == stages[rank]]
        peers = peers if len(peers) >= 3 else list(seconds)
        middle = median_low(peers)
        deviation = MAD_TO_SIGMA * median_low([abs(other - middle) for other in peers])
        if own > SLOWER * middle and own > middle + SIGMAS * deviation:
            slow.append(rank)
        excess[rank] = (own / middle if middle > 0 else 1.0, middle)
    slowest = max(excess, key=lambda rank: excess[rank][0])
    return Comparison(
        slowest_rank=slowest,
        slowest_seconds=seconds[slowest],
        median_seconds=excess[slowest][1],
        slow=tuple(slow),
    )
