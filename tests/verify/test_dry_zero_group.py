"""The 34B on 512 ranks whose shards span groups of 8: memory and calls of a step are what the plan says."""

from dataclasses import replace

import pytest

from megatron_aquila.config.derive import derive, memory_plan, traffic_plan
from megatron_aquila.plan.memory import Memory
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.verify.dry import CallRecorder, StorageTracker, dry_batch, dry_machine, dry_step, fake_world
from tests.plan.calls import as_planned, counted
from tests.verify.test_dry import COUNT, kinds_of_storage, one_step

WORLD, GROUP, PP_RANK = 512, 8, 1
GROUPS = ("tp", "dp_cp", "shards", "copies", "world", "pp")


@pytest.mark.parametrize("sharding", [{"zero": 1}, {"zero": 3}, {"zero": 2, "deterministic_reduce": True}], ids=str)
def test_a_step_of_the_34b_in_groups_of_eight(sharding: dict[str, int]) -> None:
    config = one_step("aquila2-34b")
    batch = config.train.global_batch // 4  # a microbatch a rank
    config = replace(config, train=replace(config.train, global_batch=batch))
    config = replace(config, parallel=replace(config.parallel, zero_group=GROUP, **sharding))  # type: ignore[arg-type]
    derived = derive(config, WORLD)
    order = run_schedule(config, derived)
    with fake_world(derived.grid.rank(tp=3, dp=13, pp=PP_RANK), WORLD), StorageTracker() as storages:
        machine = dry_machine(config, WORLD)
        machine.optimizer.refresh_masters()
        static, kept = storages.live, kinds_of_storage(machine)
        storages.peak = static
        groups = {name: getattr(machine.ctx, name).ranks for name in GROUPS}
        with CallRecorder() as recorder:
            dry_step(machine, [dry_batch(derived.shape, config.train.micro_batch)])
        peak = storages.peak
    assert [len(groups[name]) for name in ("dp_cp", "shards", "copies")] == [32, 8, 4]
    assert groups["shards"] == groups["dp_cp"][8:16], "the second eight of the replicas"
    assert static == sum(kept.values()) + COUNT
    planned = traffic_plan(config, derived, order).of_rank(PP_RANK)
    assert counted(recorder.calls, groups["pp"]) == as_planned(planned, groups)
    memory = memory_plan(config, derived, order).of_rank(PP_RANK)
    assert kept["master"] == memory.master_weights
    assert kept["exp_avg"] + kept["exp_avg_sq"] == memory.optimizer_states
    assert peak * (1 - 1e-4) <= memory.total <= 1.02 * peak


def test_a_group_of_eight_holds_four_times_the_shards_of_all() -> None:
    def memory(group: int | None) -> Memory:
        config = one_step("aquila2-34b")
        config = replace(config, parallel=replace(config.parallel, zero_group=group))
        derived = derive(config, WORLD)
        return memory_plan(config, derived, run_schedule(config, derived)).of_rank(PP_RANK)

    whole, cut = memory(None), memory(GROUP)
    assert (cut.weights, cut.main_grads) == (whole.weights, whole.main_grads), "buckets are padded alike"
    assert cut.optimizer_states == 4 * whole.optimizer_states
    assert cut.master_weights == 4 * whole.master_weights
