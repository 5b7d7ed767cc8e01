"""Is every layout the same model? The real engine on gloo processes against plain autograd, in float64."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.verify.compare import Row, compare, compare_bits, failed
from megatron_aquila.verify.layout import Layout, is_supported, with_layout
from megatron_aquila.verify.observe import Observation, arranged, observe_layout
from megatron_aquila.verify.plain import observe_plain
from megatron_aquila.verify.pool import WorkerError, WorkerPool
from megatron_aquila.verify.reference import plain_weights
from megatron_aquila.verify.rows import Claim, claims
from megatron_aquila.verify.shrink import shrink


class Parity:
    """Holds every layout of one small config against the plain reference, and against each other.

    ``pool(world)`` gives the workers, ``run`` the engine on them. Observations are kept: no layout is run twice.
    """

    def __init__(
        self,
        config: RunConfig,
        requested: Layout,
        pool: Callable[[int], WorkerPool],
        *,
        run: Callable[[RunConfig, WorkerPool], Observation] = observe_layout,
    ) -> None:
        self.requested, self._pool, self._run = requested, pool, run
        self.config = shrink(config, requested)
        self.shape = derive(with_layout(self.config, Layout()), 1).shape
        self.weights = plain_weights(self.shape, seed=self.config.seed)
        self.plain = observe_plain(self.config, self.weights, self.shape)
        self._observed: dict[Layout, Observation] = {}

    def observe(self, layout: Layout) -> Observation:
        """Two steps under ``layout``, run once."""
        if layout not in self._observed:
            config = with_layout(self.config, layout)
            found = self._run(config, self._pool(layout.world_size))
            self._observed[layout] = arranged(found, self.plain)
        return self._observed[layout]

    def rows(self) -> Iterable[Row]:
        """The table, a row as soon as it is known. Masked documents are also held against documents alone."""
        for claim in claims(self.requested):
            yield self.judge(claim)
        if self.config.data.reset_attention_mask:
            alone = observe_plain(self.config, self.weights, self.shape, alone=True)
            found = self.observe(self.requested)
            row = compare("document masks", self.requested, "each document alone", alone, found)
            whole = Claim(axis=row.axis, layout=self.requested)
            yield row if row.holds else replace(row, smallest=self.smallest_failing(whole))

    def judge(self, claim: Claim) -> Row:
        """Whether ``claim`` holds; where it does not, also the fewest options that break it."""
        row = self.hold(claim)
        return row if row.holds else replace(row, smallest=self.smallest_failing(claim))

    def hold(self, claim: Claim) -> Row:
        """Whether ``claim`` holds. What does not run does not hold."""
        try:
            return self._compare(claim)
        except WorkerError as error:
            return failed(claim.axis, claim.layout, "–" if claim.twin is None else str(claim.twin), str(error))

    def _compare(self, claim: Claim) -> Row:
        found = self.observe(claim.layout)
        if claim.twin is None:
            return compare(claim.axis, claim.layout, "plain", self.plain, found)
        expected = self.observe(claim.twin)
        return compare_bits(claim.axis, claim.layout, claim.twin, expected, found, claim.bits)

    def smallest_failing(self, claim: Claim) -> Layout:
        """The claim's layout without every option that can be left out, one after the other, while it still fails.

        Each is tried once, those that save processes first: at most as many layouts are run as there are options.
        """
        gone = set(claim.layout.options) - set(claim.twin.options if claim.twin is not None else claim.layout.options)
        smallest = claim.layout
        for name in sorted(claim.layout.options, key=lambda name: name not in ("pp", "dp", "tp")):
            candidate = smallest.without(name)
            less = replace(claim, layout=candidate, twin=claim.twin and candidate.without(*gone))
            is_less = candidate not in (smallest, less.twin) and is_supported(candidate)
            if is_less and not self.hold(less).holds:
                smallest = candidate
        return smallest
