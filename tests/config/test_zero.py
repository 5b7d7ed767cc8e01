"""Groups that share out what ZeRO shards: whole ones, and which worlds have them."""

from dataclasses import replace

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.derive import derive, known_replicas
from megatron_aquila.config.describe import derived_rows, traffic_rows
from megatron_aquila.config.elastic import worlds
from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.stages import Bubble
from megatron_aquila.train.banner import ways_to_save
from megatron_aquila.train.bubble import run_schedule

CONFIG = RunConfig(
    model=ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=128, seq_len=16),
    parallel=ParallelConfig(tensor=2, zero=3, zero_group=4),
    data=DataConfig(path=("a",)),
    train=TrainConfig(train_samples=960, global_batch=24),
)


def grouped(group: int, **parallel: object) -> RunConfig:
    return replace(CONFIG, parallel=replace(CONFIG.parallel, zero_group=group, **parallel))  # type: ignore[arg-type]


def test_neighbours_share_out() -> None:
    assert check(CONFIG, 16) == []
    grid = derive(CONFIG, 16).grid
    assert grid == RankGrid(tp=2, dp=8, zero_group=4)
    assert (grid.num_shards, grid.num_copies) == (4, 2)
    assert grid.shard_groups()[0] == (0, 2, 4, 6)
    assert grid.copy_groups()[0] == (0, 8)


@pytest.mark.parametrize(
    ("config", "world", "told"),
    [
        (grouped(3), 16, "dp 8 x cp 1 = 8 ranks are no whole number of groups of 3; use 2 or 4, or leave it out"),
        (grouped(16), 16, "dp 8 x cp 1 = 8 ranks are no whole number of groups of 16; use 8, or leave it out"),
        (grouped(3, data=4), None, "dp 4 x cp 1 = 4 ranks are no whole number of groups of 3; use 2, or leave it out"),
        (grouped(3, context=2), 16, "dp 4 x cp 2 = 8 ranks are no whole number of groups of 3; use 2 or 4"),
    ],
)
def test_half_a_group_is_refused(config: RunConfig, world: int | None, told: str) -> None:
    (problem,) = check(config, world)
    assert problem.flag == "--zero-group"
    assert told in str(problem)


def test_groups_of_one_send_nothing_that_is_rounded() -> None:
    (problem,) = check(grouped(1, grad_reduce="bf16"), 16)
    assert problem.flag == "--grad-reduce"
    assert "with --zero-group 1 nothing is reduced within groups" in str(problem)
    assert "use a larger --zero-group, or leave --grad-reduce out" in str(problem)
    in_order = grouped(1, grad_reduce="bf16", deterministic_reduce=True)
    for good in (grouped(1), grouped(2, grad_reduce="bf16"), in_order):
        assert check(good, 16) == []


def test_the_smallest_world_has_a_group() -> None:
    assert known_replicas(CONFIG) == 4
    assert known_replicas(grouped(4, context=2)) == 2
    assert derive(CONFIG, None).grid.num_copies == 1


def test_an_elastic_run_keeps_whole_groups() -> None:
    elastic = grouped(4, elastic=True)
    assert worlds(elastic) == [8, 16, 24, 48]
    (problem,) = check(elastic, 12)
    assert problem.flag == "--elastic"
    assert "dp 6 x cp 1 is no multiple of zero_group 4; start 8 or 16 processes" in str(problem)


def test_groups_are_told() -> None:
    derived = derive(CONFIG, 16)
    order = run_schedule(CONFIG, derived)
    rows = dict(derived_rows(CONFIG, derived, order, bubble=Bubble(own=0.0, equal=0.0)))
    assert "dp 8 x pp 1, ZeRO-3 in 2 groups of 4" in rows["ranks"]
    told = {row[0]: row[1:3] for row in traffic_rows(CONFIG, derived, order)[1]}
    assert told["gradients"] == ("reduce-scatter", "shards 4")
    assert told["gradients of copies"] == ("all-reduce", "copies 2")
    assert "raise --zero-group (now 4), or leave it out" in ways_to_save(CONFIG)
