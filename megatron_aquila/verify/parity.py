"""Is every layout the same model? The real engine on gloo processes against plain autograd, in float64."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.verify.observe import RULES, Observation, observe_layout, observe_plain
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.reference import plain_weights
from megatron_aquila.verify.shrink import Layout, shrink, with_layout

# Sums of a few thousand float64 terms in another order: 1e3 * 2^-53 = 1e-13 of the norm, with a margin of ten.
BOUND = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far one tensor is off: ``error`` is the norm of the difference over the norm of the reference."""

    tensor: str
    error: float

    @property
    def holds(self) -> bool:
        """Within the bound; NaN is not."""
        return self.error <= BOUND


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a layout, the reference it was held against, and what was found."""

    axis: str
    layout: Layout
    against: str
    worst: Difference
    first_wrong: str | None  # in forward order
    smallest: Layout | None = None  # the fewest options that still fail

    @property
    def holds(self) -> bool:
        """Whether every tensor is within the bound."""
        return self.first_wrong is None


def layouts(requested: Layout) -> dict[str, Layout]:
    """What to try: each axis of ``requested`` alone, then all together. An axis of degree 1 has nothing to prove."""
    rows = {"world of one": Layout()}
    if requested.tp > 1:
        rows["tp"] = Layout(tp=requested.tp)
        rows["tp + sp"] = Layout(tp=requested.tp, sequence=True)
    if requested.pp > 1:
        rows["pp"] = Layout(pp=requested.pp)
    if requested.dp > 1:
        rows["dp (ZeRO-1)"] = Layout(dp=requested.dp)
    if requested.micro_batch > 1:
        rows["micro-batch size"] = Layout(micro_batch=requested.micro_batch)
    rows["all together"] = requested
    return {axis: layout for index, (axis, layout) in enumerate(rows.items()) if layout not in [*rows.values()][:index]}


class Parity:
    """Holds every layout of one small config against the plain reference and the world of one.

    ``pool(world)`` gives the workers. Observations are kept, so that no layout is run twice.
    """

    def __init__(self, config: RunConfig, requested: Layout, pool: Callable[[int], WorkerPool]) -> None:
        self.requested, self._pool = requested, pool
        self.config = shrink(config, requested)
        self.shape = derive(with_layout(self.config, Layout()), 1).shape
        self.weights = plain_weights(self.shape, seed=self.config.seed)
        self.plain = observe_plain(self.config, self.weights, self.shape)
        self._observed: dict[Layout, Observation] = {}

    def observe(self, layout: Layout) -> Observation:
        """One step under ``layout``, run once."""
        if layout not in self._observed:
            config = with_layout(self.config, layout)
            self._observed[layout] = observe_layout(config, self._pool(layout.world_size))
        return self._observed[layout]

    def rows(self) -> Iterable[Row]:
        """The table, a row as soon as it is known.

        Pipelines are also held bit for bit against the world of one, and masked documents against documents alone.
        """
        for axis, layout in layouts(self.requested).items():
            row = compare(axis, layout, "plain", self.plain, self.observe(layout))
            yield row if row.holds else replace(row, smallest=self.smallest_failing(layout))
            if layout == Layout(pp=layout.pp) and layout.pp > 1:
                yield compare_bits(axis, layout, self.observe(Layout()), self.observe(layout))
        if self.config.data.reset_attention_mask:
            alone = observe_plain(self.config, self.weights, self.shape, alone=True)
            row = compare("document masks", self.requested, "each document alone", alone, self.observe(self.requested))
            yield row if row.holds else replace(row, smallest=self.smallest_failing(self.requested))

    def smallest_failing(self, layout: Layout) -> Layout:
        """The layout with the fewest of ``layout``'s options that still differs from the plain reference."""
        plain_options = asdict(Layout())
        options: dict[str, Any] = {
            name: value for name, value in asdict(layout).items() if value != plain_options[name]
        }
        for count in range(len(options) + 1):
            for chosen in itertools.combinations(options, count):
                candidate = replace(Layout(), **{name: options[name] for name in chosen})
                if not compare("", candidate, "plain", self.plain, self.observe(candidate)).holds:
                    return candidate
        return layout


def tensors(observation: Observation) -> dict[str, Tensor]:
    """Everything observed by name, in forward order: loss, gradients, gradient norm, updated parameters."""
    named = {"loss": torch.tensor(observation.loss, dtype=torch.float64)}
    named |= {f"gradient of {name}": value for name, value in observation.gradients.items()}
    named["gradient norm"] = torch.tensor(observation.grad_norm, dtype=torch.float64)
    for rule in RULES:
        named |= {f"{name} after {rule}": value for name, value in observation.updated[rule].items()}
    return named


def compare(axis: str, layout: Layout, against: str, expected: Observation, found: Observation) -> Row:
    """Hold ``found`` against ``expected``, tensor by tensor, relative to each tensor's norm."""
    return _row(axis, layout, against, expected, found, relative_error)


def compare_bits(axis: str, layout: Layout, expected: Observation, found: Observation) -> Row:
    """Hold gradients bit for bit. The norm and what follows from it sum in another order, and are left out."""
    return _row(axis, layout, "world of one, bit for bit", _gradients_only(expected), _gradients_only(found), bit_error)


def _gradients_only(observation: Observation) -> Observation:
    return replace(observation, grad_norm=0.0, updated={rule: {} for rule in RULES})


def _row(
    axis: str,
    layout: Layout,
    against: str,
    expected: Observation,
    found: Observation,
    error: Callable[[Tensor, Tensor], float],
) -> Row:
    theirs = tensors(found)
    differences = [
        Difference(tensor=name, error=error(value, theirs[name]) if name in theirs else float("nan"))
        for name, value in tensors(expected).items()
    ]
    wrong = [difference for difference in differences if not difference.holds]
    worst = max(
        differences, key=lambda difference: float("inf") if difference.error != difference.error else difference.error
    )
    return Row(axis=axis, layout=layout, against=against, worst=worst, first_wrong=wrong[0].tensor if wrong else None)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """||found - expected|| / ||expected||; the norm of ``found`` where nothing is expected."""
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale if scale > 0 else 1.0)


def bit_error(expected: Tensor, found: Tensor) -> float:
    """0 where every bit is equal, else at least the bound's double."""
    return 0.0 if torch.equal(expected, found) else max(2 * BOUND, relative_error(expected, found))
