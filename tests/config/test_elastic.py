"""An elastic run goes on with fewer or more replicas where the global batch allows it, and says which worlds would."""

from dataclasses import replace

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.derive import derive
from megatron_aquila.config.elastic import worlds
from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig

CONFIG = RunConfig(
    model=ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=128, seq_len=16),
    parallel=ParallelConfig(tensor=2, data=4, elastic=True),
    data=DataConfig(path=("a",)),
    train=TrainConfig(train_samples=800, micro_batch=2, global_batch=24),
)


@pytest.mark.parametrize(("world", "dp", "microbatches"), [(8, 4, 3), (6, 3, 4), (4, 2, 6), (2, 1, 12), (24, 12, 1)])
def test_dp_follows_the_world_and_the_global_batch_stays(world: int, dp: int, microbatches: int) -> None:
    assert check(CONFIG, world) == []
    derived = derive(CONFIG, world)
    assert derived.grid.dp == dp
    assert derived.batch_at(0) == (24, microbatches)


@pytest.mark.parametrize(
    ("world", "told"),
    [
        (10, "dp 5 x micro_batch 2 does not divide the global batch of 24; start 8 or 12 processes"),
        (7, "7 processes are no whole number of replicas of 2; start 6 or 8 processes"),
        (1, "1 processes are no whole number of replicas of 2; start 2 processes"),
        (40, "dp 20 x micro_batch 2 does not divide the global batch of 24; start 24 processes"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_worlds(world: int, told: str) -> None:
    (problem,) = check(CONFIG, world)
    assert problem.flag == "--elastic"
    assert told in str(problem)


def test_every_world_it_names_runs_and_no_other_up_to_there() -> None:
    ramp = replace(CONFIG, train=replace(CONFIG.train, rampup_batch=(12, 12, 100)))
    for config in (CONFIG, ramp):
        runs = [world for world in range(1, 60) if not check(config, world)]
        assert runs == worlds(config)
    assert worlds(ramp) == [2, 4, 6, 12]


def test_without_it_a_given_dp_holds() -> None:
    (problem,) = check(replace(CONFIG, parallel=replace(CONFIG.parallel, elastic=False)), 6)
    assert problem.flag == "--dp"


def test_a_batch_that_no_world_divides_is_the_batchs_own_problem() -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, global_batch=25))
    assert [problem.flag for problem in check(config, 8)] == ["--global-batch"]
