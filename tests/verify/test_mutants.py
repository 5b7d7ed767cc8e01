"""The proof of the proof: each seeded bug turns the row of its axis red, and the tensor where it shows is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_aquila.config.schema import ParallelConfig
from megatron_aquila.verify.compare import BOUND
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.pool import WorkerPool
from tests.families import of_family
from tests.verify.mutants import MUTANTS, run_mutant, with_switches
from tests.verify.test_parity import CONFIG

LARGEST = Layout(tp=2, pp=2, dp=2)
Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_caught_and_named(name: str, pool: Pools) -> None:
    mutant = MUTANTS[name]
    config, largest = of_family(with_switches(CONFIG, mutant.documents), mutant.model), LARGEST
    if mutant.layout.chunks > 1:  # needs a layer for every stage
        config, largest = replace(config, parallel=ParallelConfig()), mutant.layout
    parity = Parity(config, largest, pool, run=run_mutant(name))
    row = parity.hold(mutant.claim)
    assert not row.holds, f"{mutant.bug}: not seen"
    assert row.first_wrong == mutant.tensor
    assert not row.worst.error <= 10 * BOUND, "too close to the bound to be called caught"
