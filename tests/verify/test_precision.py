"""Layouts in the precisions that are trained in: against the plain model in float64, within what rounding explains."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_aquila.plan.shape import Precision
from megatron_aquila.verify.observe import observe_layout
from megatron_aquila.verify.parity import Parity, relative_error
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import Layout, with_layout
from tests.verify.test_parity import CONFIG, FULL

# A gradient passes through some 16 roundings a layer, forward and backward, of which 3 layers lie in a row. Their
# errors add up at worst: 48 unit roundoffs, 2^-24 in fp32 and 2^-9 in bf16, of each tensor's norm.
BOUNDS: dict[Precision, float] = {"fp32": 48 * 2**-24, "bf16": 48 * 2**-9}


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence=True), Layout(pp=2, dp=2)], ids=str)
def test_gradients_are_as_near_as_rounding_allows(
    precision: Precision, layout: Layout, pool: Callable[[int], WorkerPool]
) -> None:
    parity = Parity(CONFIG, FULL, pool)
    config = with_layout(parity.config, layout)
    found = observe_layout(replace(config, train=replace(config.train, precision=precision)), pool(layout.world_size))
    errors = {
        name: relative_error(gradient, found.gradients[name].double())
        for name, gradient in parity.plain.gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= BOUNDS[precision], f"{worst}: {errors[worst]:.2e}"
    assert max(errors.values()) > 2**-50, "computed in float64 after all"
    assert found.loss == pytest.approx(parity.plain.loss, rel=BOUNDS[precision])
