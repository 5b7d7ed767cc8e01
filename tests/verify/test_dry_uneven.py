"""FlagScale's recipes for mixed clusters, as its scripts have them: planned, checked, and one of them traced."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive, memory_plan, traffic_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import ConfigError
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.build import plan_work
from megatron_aquila.verify.dry import CallRecorder, StorageTracker, dry_batch, dry_machine, dry_step, fake_world
from tests.plan.calls import as_planned, counted

A100, A800 = 40, 80  # GiB
LARGE = "--preset aquila2-34b --gbs 1024"
STAGES_34B = f"{LARGE} --mbs 1 --stage-layers 15 15 15 15 --recompute full --recompute-method uniform"
REPLICAS_34B = f"{LARGE} --micro-batch-per-dp" + 8 * " 2" + 16 * " 1"
STAGES_70B = "--preset aquila2-70b --gbs 1024 --mbs 1 --stage-layers 20 20 20 20 --rampup-batch 32 32 2000000"
CHIPS_70B = (
    f"--preset aquila2-70b --tp 4 --pp 22 --gbs 2048 --mbs 1 --rampup-batch none --stage-layers{20 * ' 2'} 20 20 "
    "--recompute full --recompute-granularity-per-stage 22"
)


def settings(words: str, world: int) -> RunConfig:
    return load_config(words.split(), world_size=world).config


def gibibytes(
    config: RunConfig, world: int, micro_batch: int | None = None, ranks: Sequence[int] = range(4)
) -> list[float]:
    """What the plan of each of these pipeline ranks needs."""
    derived = derive(config, world)
    plan = memory_plan(config, derived, run_schedule(config, derived), micro_batch=micro_batch)
    return [plan.of_rank(rank).total / 2**30 for rank in ranks]


@pytest.mark.parametrize(("words", "layers"), [(STAGES_34B, 15), (STAGES_70B, 20)], ids=["34b", "70b"])
def test_the_recipes_with_a_first_stage_on_other_devices_are_planned(words: str, layers: int) -> None:
    config = settings(words, 512)
    derived = derive(config, 512)
    assert [len(stage) for stage in derived.stages.layers] == [layers] * 4
    on_a800 = {rank for rank in range(512) if derived.grid.coords(rank)["pp"] == 0}
    assert on_a800 == set(range(16 * 8)), "the first 16 nodes hold the first stage"
    assert max(gibibytes(config, 512)) < A100, "which it would not even need to"
    work = plan_work(config, derived, pp_rank=0)
    assert len(work.programs) == 32, "a program for every batch of the ramp"


def test_the_recipe_with_unequal_replicas_is_planned_for_24_of_them() -> None:
    """16 A800 nodes are 8 replicas of tp 4 x pp 4, 32 A100 nodes the other 16: not the 48 of the script's name."""
    config = settings(REPLICAS_34B, 384)
    derived = derive(config, 384)
    assert derived.batch_at(10**9) == (1024, 32)
    assert set(plan_work(config, derived, pp_rank=0).programs) == set(range(1, 33))
    assert A100 < max(gibibytes(config, 384, 2)) < A800
    assert max(gibibytes(config, 384, 1)) < A100 * 0.7
    assert gibibytes(config, 384) == gibibytes(config, 384, 2), "by default the largest"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (REPLICAS_34B, "it is for 24 replicas, dp is 32; give 32 of them, or start 384 processes"),
        (REPLICAS_34B + 8 * " 1", "--gbs 1024: is not a multiple of 40, what micro_batch_per_dp adds up to; use 1000 "),
    ],
)
def test_on_the_64_nodes_of_its_name_it_is_refused(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(words, 512)
    assert told in str(refused.value)


def test_the_recipe_with_two_long_stages_at_the_end_needs_more_than_they_have_or_recomputation() -> None:
    as_published, all_again = settings(f"{CHIPS_70B} 0", 88), settings(f"{CHIPS_70B} 1", 88)
    first, *last = gibibytes(as_published, 88, ranks=(0, 20, 21))
    assert first < 32, "the largest of 20 stages of 2 layers"
    assert min(last) > A800
    assert max(gibibytes(all_again, 88, ranks=(20, 21))) < A800


@pytest.mark.parametrize(
    ("words", "pp_rank"),
    [(STAGES_70B, 0), (STAGES_70B, 3), (STAGES_34B, 0), (STAGES_34B, 3)],
    ids=["70b-first", "70b-last", "34b-first", "34b-last"],
)
def test_the_recipes_with_a_first_stage_on_other_devices_take_a_step(words: str, pp_rank: int) -> None:
    """All layers of the stage; one microbatch, as of the 34B in the first batch of its ramp."""
    recipe = settings(words, 512)
    grid = derive(recipe, 512).grid
    config = replace(recipe, train=replace(recipe.train, global_batch=grid.dp, rampup_batch=None))
    assert_as_planned(config, 512, grid.rank(pp=pp_rank), micro_batch=1)


@pytest.mark.parametrize(("dp_rank", "size"), [(7, 2), (8, 1)])
def test_a_replica_s_calls_and_bytes_are_those_of_its_own_micro_batch(dp_rank: int, size: int) -> None:
    recipe = settings(REPLICAS_34B, 384)
    config = replace(
        recipe,
        model=replace(recipe.model, num_layers=8),
        train=replace(recipe.train, global_batch=32, rampup_batch=None),  # the ramp's first
    )
    rank = derive(config, 384).grid.rank(dp=dp_rank, pp=1)
    assert_as_planned(config, 384, rank, micro_batch=size)


def assert_as_planned(config: RunConfig, world: int, rank: int, *, micro_batch: int) -> None:
    """One step on ``rank``: its calls and their bytes are the plan's, its memory is within it, and hardly less."""
    derived = derive(config, world)
    pp_rank, num_microbatches = derived.grid.coords(rank)["pp"], derived.batch_at(0)[1]
    with fake_world(rank, world), StorageTracker() as storages, CallRecorder() as recorder:
        machine = dry_machine(config, world)
        dry_step(machine, [dry_batch(derived.shape, micro_batch) for _ in range(num_microbatches)])
        groups = {name: getattr(machine.ctx, name).ranks for name in ("tp", "dp_cp", "world", "pp")}
    planned = traffic_plan(config, derived, micro_batch=micro_batch).of_rank(pp_rank)
    assert counted(recorder.calls, groups["pp"]) == as_planned(planned, groups)
    order = run_schedule(config, derived)
    memory = memory_plan(config, derived, order, micro_batch=micro_batch).of_rank(pp_rank).total
    assert (1 - 1e-4) * storages.peak <= memory <= 1.02 * storages.peak
