"""Layouts in the precisions that are trained in: against the plain model in float64, within what rounding explains."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.shape import Precision
from megatron_aquila.verify.compare import relative_error
from megatron_aquila.verify.layout import Layout, with_layout
from megatron_aquila.verify.observe import observe_layout, observe_rank
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.pool import WorkerPool
from tests.verify.test_parity import CONFIG, FULL

# A gradient passes through some 16 roundings a layer, forward and backward, of which 3 layers lie in a row. Their
# errors add up at worst: 48 unit roundoffs, 2^-24 in fp32, 2^-9 in bf16 and 2^-11 in fp16, of each
# tensor's norm.
BOUNDS: dict[Precision, float] = {"fp32": 48 * 2**-24, "bf16": 48 * 2**-9, "fp16": 48 * 2**-11}
SCALE = 522893 / 16  # no power of two, so dividing by it rounds; 522893 itself is too much for so few tokens


def in_precision(config: RunConfig, precision: Precision, loss_scale: float = SCALE) -> RunConfig:
    return replace(
        config,
        train=replace(config.train, precision=precision),
        optim=replace(config.optim, initial_loss_scale=loss_scale),
    )


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence=True), Layout(pp=2, dp=2)], ids=str)
def test_gradients_are_as_near_as_rounding_allows(
    precision: Precision, layout: Layout, pool: Callable[[int], WorkerPool]
) -> None:
    parity = Parity(CONFIG, FULL, pool)
    config = with_layout(parity.config, layout)
    config = in_precision(config, precision)
    found = observe_layout(config, pool(layout.world_size))
    errors = {
        name: relative_error(gradient, found.gradients[name].double())
        for name, gradient in parity.plain.gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= BOUNDS[precision], f"{worst}: {errors[worst]:.2e}"
    assert max(errors.values()) > 2**-50, "computed in float64 after all"
    assert found.loss == pytest.approx(parity.plain.loss, rel=BOUNDS[precision])


def test_a_scale_that_is_a_power_of_two_changes_no_bit(pool: Callable[[int], WorkerPool]) -> None:
    parity = Parity(CONFIG, FULL, pool)

    def observe(scale: float) -> dict[str, torch.Tensor]:
        found = observe_layout(in_precision(with_layout(parity.config, Layout()), "fp16", scale), pool(1))
        return {**found.gradients, **{f"{name} after sgd": value for name, value in found.updated["sgd"].items()}}

    def same(found: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(found[name], high[name]) for name in high)

    high = observe(2.0**16)
    assert same(observe(2.0**13))
    assert not same(observe(SCALE)), "rounded once more"
    assert not same(observe(2.0**-6)), "without a scale nothing underflows, and none is needed"


def test_an_overflow_anywhere_is_seen_everywhere(pool: Callable[[int], WorkerPool]) -> None:
    parity = Parity(CONFIG, FULL, pool)
    config = in_precision(with_layout(parity.config, Layout(pp=2, dp=2)), "fp16", 2.0**19.5)  # too much for one rank
    parts = pool(4).run(observe_rank, config)
    assert not any(math.isfinite(part.grad_norm) for part in parts)
    finite = [all(chunk.tensor.isfinite().all() for chunk in part.gradients) for part in parts]
    assert True in finite, f"no rank's own gradients are finite, so none could have gone on alone: {finite}"
