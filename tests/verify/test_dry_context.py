"""Long samples that are split over ranks, in one process without a byte of data: memory and calls are the planned."""

from dataclasses import replace

import pytest
import torch

from megatron_aquila.config.check import check
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive, memory_plan, traffic_plan
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.verify.dry import META, CallRecorder, StorageTracker, dry_batch, dry_machine, dry_step, fake_world
from tests.plan.calls import as_planned, counted

FLASH_STATE = 24  # bytes a layer and microbatch that torch's flash attention keeps beside its output
SUMS = 24  # bytes, in float64: loss and tokens of one source, and what a loss is multiplied with


@pytest.mark.parametrize(
    ("words", "pp_rank"),
    [
        ("--cp 8", 1),
        ("--cp 4 --cp-method ulysses", 3),
        ("--cp 8 --recompute selective --recompute-modules attention", 0),
    ],
)
def test_a_hundred_and_twenty_eight_thousand_tokens_of_the_34b(words, pp_rank):
    world, argv = 512, ["--preset", "aquila2-34b", "--seq-len", "131072", *words.split()]
    config = load_config(argv, world_size=world).config
    grid = derive(config, world).grid
    config = replace(config, train=replace(config.train, global_batch=grid.dp, rampup_batch=None))
    assert check(config, world) == []
    derived = derive(config, world)
    rank = grid.rank(tp=grid.tp - 1, cp=1, dp=grid.dp - 1, pp=pp_rank)
    with fake_world(rank, world), StorageTracker() as storages, CallRecorder() as recorder:
        machine, kept = dry_machine(config, world), []
        batch, (stage,) = dry_batch(derived.shape, 1, cp=grid.cp), machine.stages.values()
        before = storages.live
        stage.register_forward_hook(lambda *_: kept.append(storages.live - before))
        dry_step(machine, [batch])
        groups = {name: getattr(machine.ctx, name).ranks for name in ("tp", "cp", "dp_cp", "world", "pp")}
        message = torch.empty(machine.wire._shape, dtype=machine.wire._dtype, device=META).nbytes
        peak = storages.peak - before
    planned = traffic_plan(config, derived).of_rank(pp_rank)
    assert any(row.group == "cp" for row in planned)
    assert counted(recorder.calls, groups["pp"], groups["cp"]) == as_planned(planned, groups)

    plan, tokens = memory_plan(config, derived, run_schedule(config, derived)), 131072 // grid.cp
    is_last, is_ring = pp_rank == grid.pp - 1, config.parallel.context_method == "ring"
    around = 4 * tokens if is_last else 2 * message  # the losses; or the output, and the gradient that is awaited
    states = 0 if is_ring else FLASH_STATE * len(derived.stages.layers[pp_rank])
    assert kept == [plan.activations_of_rank(pp_rank) + around + states + SUMS]
    memory = plan.of_rank(pp_rank)
    assert peak * (1 - 1e-5) <= memory.activations + memory.temporaries <= peak * 1.01


def test_activations_of_a_rank_do_not_depend_on_how_long_the_sample_is():
    """Eight times the tokens on eight times the ranks: each keeps what it kept."""

    def kept(words: str) -> int:
        config = load_config(["--preset", "aquila2-7b", *words.split()], world_size=8).config
        derived = derive(config, 8)
        return memory_plan(config, derived, run_schedule(config, derived)).activations_of_rank(0)

    assert kept("--seq-len 16384 --cp 8") == kept("--seq-len 2048")
    assert kept("--seq-len 16384 --cp 8 --cp-method ulysses") > kept("--seq-len 2048"), "the output, twice"
