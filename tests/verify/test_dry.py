"""The large recipes, one process: every class of rank is built and takes a step without a byte of data."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aquila.config.check import RULES
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive, memory_plan, traffic_plan
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.rms_norm import rms_norm_reference
from megatron_aquila.model.aquila import build_stages
from megatron_aquila.optim.buckets import Reduction
from megatron_aquila.optim.flat import Flat
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.pipeline.checks import check
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.plan.flops import num_params
from megatron_aquila.plan.memory import MemoryPlan
from megatron_aquila.plan.moments import StageBytes
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.build import DTYPES, Machine, build_machine, create_context
from megatron_aquila.verify.dry import (
    META,
    Call,
    CallRecorder,
    StorageTracker,
    dry_batch,
    dry_machine,
    dry_step,
    fake_world,
    flash_attention,
)
from tests.plan.calls import as_planned, counted

WORLDS = {"aquila2-34b": 512, "aquila2-70b": 768}
# Microbatches of the step that is traced, which the batch ramp has. With 4 every stage of the 34B holds as much as it
# ever will; 1 is enough to see that the formula follows the shape.
STEPS = {"aquila2-34b": 4, "aquila2-70b": 1}
FLASH_STATE = 24  # bytes a layer and microbatch: torch's flash kernel keeps a random state, dropout or not
COUNT = 8  # bytes: how many updates there were
SUMS = 24  # bytes, in float64: loss and tokens of one source, and what a loss is multiplied with


@cache
def recipe(preset: str) -> RunConfig:
    return load_config(["--preset", preset], world_size=WORLDS[preset]).config


@cache
def one_step(preset: str) -> RunConfig:
    """The recipe at the step of its ramp that is traced."""
    config, world = recipe(preset), WORLDS[preset]
    batch = STEPS[preset] * config.train.micro_batch * derive(config, world).grid.dp
    assert batch in derive(config, world).batches.sizes()
    return replace(config, train=replace(config.train, global_batch=batch, rampup_batch=None))


def kinds_of_storage(machine: Machine) -> dict[str, int]:
    """Bytes of the storages behind weights, gradients, masters and states, each counted once."""
    storages: dict[str, dict[int, int]] = {}
    for kind, _, view in machine.optimizer.ranges():
        storage = view.untyped_storage()
        storages.setdefault(kind, {})[storage._cdata] = storage.nbytes()
    return {kind: sum(sizes.values()) for kind, sizes in storages.items()}


def planned(config: RunConfig, world: int) -> MemoryPlan:
    derived = derive(config, world)
    return memory_plan(config, derived, run_schedule(config, derived))


@dataclass
class Traced:
    """What a step did on one rank."""

    static: int
    by_kind: dict[str, int]
    after_forwards: list[int]  # live bytes after each forward, those before the step taken off
    peak: int
    calls: list[Call]
    groups: dict[str, tuple[int, ...]]
    message: int


@cache
def traced(preset: str, rank: int) -> Traced:
    config, world = one_step(preset), WORLDS[preset]
    with fake_world(rank, world), StorageTracker() as storages, CallRecorder() as recorder:
        machine = dry_machine(config, world)
        static = storages.live
        batches = [dry_batch(machine.derived.shape, config.train.micro_batch) for _ in range(STEPS[preset])]
        before, after_forwards = storages.live, []
        (stage,) = machine.stages.values()
        stage.register_forward_hook(lambda *_: after_forwards.append(storages.live - before))
        dry_step(machine, batches)
        ctx = machine.ctx
        message = torch.empty(machine.wire._shape, dtype=machine.wire._dtype, device=META)
        return Traced(
            static=static,
            by_kind=kinds_of_storage(machine),
            after_forwards=after_forwards,
            peak=storages.peak - before,
            calls=recorder.calls,
            groups={name: getattr(ctx, name).ranks for name in ("tp", "dp_cp", "world", "pp")},
            message=message.nbytes,
        )


def class_rank(preset: str, pp_rank: int) -> int:
    """A rank of that pipeline stage: the first of the world, else the last of its stage, with the short vocabulary."""
    grid = derive(recipe(preset), WORLDS[preset]).grid
    return 0 if pp_rank == 0 else grid.rank(tp=grid.tp - 1, dp=grid.dp - 1, pp=pp_rank)


STAGES = [(preset, pp_rank) for preset in WORLDS for pp_rank in range(4)]


@pytest.mark.parametrize("preset", WORLDS)
def test_every_check_passes(preset):
    config = recipe(preset)
    assert [problem for rule in RULES for problem in rule(config, WORLDS[preset])] == []


@pytest.mark.parametrize("preset", WORLDS)
def test_groups_name_the_right_peers(preset):
    grid, world = derive(recipe(preset), WORLDS[preset]).grid, WORLDS[preset]
    tp, dp = grid.tp, grid.dp
    for axes in (("tp",), ("dp",), ("pp",), ("dp", "cp"), ("tp", "cp", "dp", "pp")):
        assert sorted(rank for ranks in grid.groups(*axes) for rank in ranks) == list(range(world))
    for rank in [grid.rank(tp=t, dp=d, pp=p) for t in (0, tp - 1) for d in (0, dp - 1) for p in range(4)]:
        with fake_world(rank, world):
            ctx = create_context(recipe(preset), derive(recipe(preset), world), META)
            stage = rank // (tp * dp) * tp * dp
            expected = {
                "tp": range(rank // tp * tp, rank // tp * tp + tp),
                "dp": range(stage + rank % tp, stage + tp * dp, tp),
                "dp_cp": range(stage + rank % tp, stage + tp * dp, tp),
                "pp": range(rank % (tp * dp), world, tp * dp),
                "world": range(world),
            }
            for name, ranks in expected.items():
                group = getattr(ctx, name)
                assert group.ranks == tuple(ranks) == tuple(dist.get_process_group_ranks(group.handle)), name
                assert group.ranks[group.rank] == rank
                assert group.size == len(ranks) == dist.get_world_size(group.handle)
            links = list(ctx.pp_links.values())
            assert {link.ranks for link in links} == {tuple(expected["pp"])}
            assert len({id(link.handle) for link in links}) == len(links) == 4, "one for each of F and B, even and odd"


@pytest.mark.parametrize("preset", WORLDS)
def test_parameters_of_all_ranks_add_up_to_the_model(preset):
    derived = derive(recipe(preset), WORLDS[preset])
    grid, shape = derived.grid, derived.shape
    kernels, config = choose_kernels(META, torch.bfloat16), recipe(preset)
    logical, local, names = 0, 0, Counter()
    for pp_rank in range(grid.pp):
        for tp_rank in range(grid.tp):
            tp = Group("tp", tp_rank, grid.tp, tuple(range(grid.tp)), None)
            sequence_parallel = config.parallel.sequence
            placement = Placement(tp=tp, sequence_parallel=sequence_parallel, dtype=torch.bfloat16, device=META)
            stages = build_stages(shape, derived.stages, pp_rank=pp_rank, placement=placement, kernels=kernels)
            infos = [info for stage in stages.values() for info in stage.param_infos()]
            local += sum(info.param.numel() for info in infos)
            parts = [part for info in infos for part in info.parts if part.replica == 0]
            logical += sum(prod(part.shape) for part in parts)
            names.update({part.name: prod(part.shape) / prod(part.global_shape) for part in parts})
    assert logical == num_params(shape)
    padding = 2 * (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size
    replicas = (grid.tp - 1) * (2 * shape.num_layers + 1) * shape.hidden_size
    assert local == logical + padding + replicas
    assert all(share == pytest.approx(1) for share in names.values())


@pytest.mark.parametrize(("preset", "pp_rank"), STAGES)
def test_what_a_rank_keeps_is_what_the_plan_says(preset, pp_rank):
    trace = traced(preset, class_rank(preset, pp_rank))
    memory = planned(one_step(preset), WORLDS[preset]).of_rank(pp_rank)
    assert trace.by_kind == {
        "weight": memory.weights,
        "grad": memory.main_grads,
        "master": memory.master_weights,
        "exp_avg": memory.optimizer_states // 2,
        "exp_avg_sq": memory.optimizer_states // 2,
    }
    assert trace.static == sum(trace.by_kind.values()) + COUNT


@pytest.mark.parametrize(
    ("narrow", "kinds"),
    [
        ({"moments_dtype": "bf16"}, {"master"}),
        ({"moments_dtype": "bf16", "master_weights": "remainder"}, {"remainder"}),
    ],
)
def test_narrow_states_are_as_large_as_the_plan_says(narrow, kinds):
    config = recipe("aquila2-34b")
    config = replace(config, optim=replace(config.optim, **narrow))
    with fake_world(0, 512), StorageTracker() as storages:
        kept, static = kinds_of_storage(dry_machine(config, 512)), storages.live
    memory = planned(config, 512).of_rank(0)
    assert kept.keys() == {"weight", "grad", "exp_avg", "exp_avg_sq", *kinds}
    assert sum(kept[kind] for kind in kinds) == memory.master_weights
    assert kept["exp_avg"] + kept["exp_avg_sq"] == memory.optimizer_states
    assert static == sum(kept.values()) + COUNT


@pytest.mark.parametrize(("preset", "pp_rank"), STAGES)
def test_what_microbatches_in_flight_keep_is_what_the_plan_says(preset, pp_rank):
    derived, trace = derive(one_step(preset), WORLDS[preset]), traced(preset, class_rank(preset, pp_rank))
    plan = planned(one_step(preset), WORLDS[preset])
    in_flight = min(derived.grid.pp - pp_rank, STEPS[preset])
    is_last = pp_rank == derived.grid.pp - 1
    tokens = plan.micro_batch * plan.shape.seq_len
    # At the end of the last forward before the first backward: what is kept, the output, and the one still being sent.
    kept = plan.activations_of_rank(pp_rank) + in_flight * len(derived.stages.layers[pp_rank]) * FLASH_STATE
    output = 4 * tokens if is_last else trace.message
    sending = trace.message if in_flight > 1 else 0
    awaited = 0 if is_last else trace.message  # the first gradient's receive is posted ahead
    assert trace.after_forwards[in_flight - 1] == kept + output + sending + awaited + SUMS
    memory = plan.of_rank(pp_rank)
    # the loss's numbers of each token are not in the plan
    assert trace.peak * (1 - 1e-4) <= memory.activations + memory.temporaries <= trace.peak * 1.01


@pytest.mark.parametrize(
    ("schedule", "recompute", "pp_rank"),
    [
        ("zb-h1", "none", 0),
        ("zb-h1", "none", 2),
        ("zb-h1", "full", 2),
        ("zb-v", "none", 0),
        ("zb-v", "none", 3),
        ("zb-v", "full", 2),
    ],
)
def test_weight_gradients_that_wait_are_planned_for(schedule, recompute, pp_rank):
    """Under sequence parallel they wait with whole operands, which a plan by what autograd keeps would leave out."""
    config = RunConfig(
        model=ModelConfig(num_layers=8),
        parallel=ParallelConfig(tensor=4, pipeline=4, sequence=True, schedule=schedule),
        train=TrainConfig(global_batch=8, recompute=recompute),
    )
    derived = derive(config, 16)
    with fake_world(derived.grid.rank(tp=3, pp=pp_rank), 16), StorageTracker() as storages:
        machine = dry_machine(config, 16)
        dry_step(machine, [dry_batch(derived.shape, 1) for _ in range(8)])
        peak = storages.peak
    plan = planned(config, 16)
    assert peak <= plan.of_rank(pp_rank).total <= 1.02 * peak
    with mock.patch.object(StageBytes, "_owed", mock.Mock(return_value=0)):
        less = plan._walk(pp_rank)
        without = sum(less.fullest(plan.order[pp_rank])) + plan.between_steps(pp_rank).total
    assert without < peak, "without them the plan would be too small"


@pytest.mark.parametrize(
    "reduction",
    [{"deterministic_reduce": True}, {"grad_reduce": "bf16"}, {"deterministic_reduce": True, "overlap": False}],
)
def test_reductions_hold_copies_of_two_buckets_at_most(reduction):
    config = RunConfig(
        model=ModelConfig(num_layers=4), parallel=ParallelConfig(**reduction), train=TrainConfig(global_batch=8)
    )

    def peak() -> int:
        with fake_world(3, 8), StorageTracker() as storages:
            machine = dry_machine(config, 8)
            dry_step(machine, [dry_batch(machine.derived.shape, 1)])
            return storages.peak

    total = planned(config, 8).peak().total
    assert peak() <= total
    with mock.patch.object(Reduction, "most_under_way", None):
        assert peak() > total, "copies of all buckets at once are more than is planned"


SHARDED = [  # what is shared out, and on which pipeline rank
    ({"zero": 2}, 0),
    ({"zero": 2, "deterministic_reduce": True}, 0),
    ({"zero": 2, "grad_reduce": "bf16", "overlap": False}, 0),
    ({"zero": 3}, 0),
    ({"zero": 3, "overlap": False, "fuse_main_grads": False}, 0),
    ({"zero": 3, "schedule": "gpipe"}, 0),
    ({"zero": 3, "pipeline": 2}, 1),
    ({"zero": 3, "pipeline": 2, "chunks": 2}, 0),
    ({"zero": 3, "pipeline": 2, "schedule": "zb-h1"}, 0),
    ({"zero": 3, "pipeline": 2, "schedule": "zb-v"}, 0),
    ({"zero": 3, "pipeline": 2, "schedule": "zb-v"}, 1),
]


@pytest.mark.parametrize(("sharding", "pp_rank"), SHARDED)
def test_what_is_sharded_has_the_memory_that_is_planned(sharding, pp_rank):
    """Shards to the byte; what is whole beside them, and the rest, at the moment at which there is most of all."""
    model = ModelConfig(num_layers=4, hidden_size=1024, num_heads=8, seq_len=256, vocab_size=16384)
    parallel = ParallelConfig(bucket_mib=16, **sharding)
    config = RunConfig(model=model, parallel=parallel, train=TrainConfig(global_batch=16))
    derived = derive(config, 8)
    with fake_world(derived.grid.rank(dp=1, pp=pp_rank), 8), StorageTracker() as storages:
        machine = dry_machine(config, 8)
        machine.optimizer.refresh_masters()  # what is whole to be filled is let go of
        static, kept = storages.live, kinds_of_storage(machine)
        storages.peak = static
        dry_step(machine, [dry_batch(derived.shape, 1) for _ in range(16 // derived.grid.dp)])
        peak = storages.peak
    plan = planned(config, 8)
    memory, shards = plan.of_rank(pp_rank), plan.between_steps(pp_rank)
    expected = {"weight": shards.weights, "grad": shards.main_grads, "master": memory.master_weights}
    assert expected.items() <= kept.items()
    assert static == sum(kept.values()) + COUNT == shards.total + COUNT
    assert 0.998 * peak <= memory.total <= 1.01 * peak
    whole = memory.weights + memory.main_grads - shards.weights - shards.main_grads
    assert memory.total - whole < 0.998 * peak, "without what is whole the plan would be too small"


WIDE_HEADS = [
    ({"norm_head": True}, {}, {}),
    ({"norm_head": True}, {}, {"tensor": 4, "sequence": True}),
    ({"norm_head": True}, {}, {"fuse_main_grads": False}),
    ({"norm_head": True}, {"loss_chunk_tokens": 0}, {}),
    ({}, {"loss_chunk_tokens": 0}, {}),
    ({}, {"loss_chunk_tokens": 0, "recompute": "full"}, {}),
    ({}, {"loss_chunk_tokens": 0}, {"zero": 2, "fuse_main_grads": False}),
]


@pytest.mark.parametrize(("head", "train", "parallel"), WIDE_HEADS, ids=str)
def test_a_head_that_is_most_of_a_model_has_the_memory_that_is_planned(head, train, parallel):
    """Rows of length 1, logits that are kept, or both: what there is of them is the fullest moment."""
    model = ModelConfig(num_layers=2, hidden_size=512, num_heads=8, seq_len=256, vocab_size=65536, **head)
    parallel = ParallelConfig(bucket_mib=16, **parallel)
    config = RunConfig(model=model, parallel=parallel, train=TrainConfig(global_batch=16, **train))
    derived = derive(config, 8)
    with fake_world(1, 8), StorageTracker() as storages:
        machine = dry_machine(config, 8)
        machine.optimizer.refresh_masters()
        storages.peak = storages.live
        dry_step(machine, [dry_batch(derived.shape, 1) for _ in range(16 // derived.grid.dp)])
        peak = storages.peak
    assert 0.998 * peak <= planned(config, 8).of_rank(0).total <= 1.01 * peak


def test_a_kernel_that_keeps_more_is_seen():
    """The tracker's own mutant: a norm by plain autograd keeps float32 copies, which the formula does not have."""
    config = RunConfig(model=ModelConfig(num_layers=2, hidden_size=64, num_heads=4, seq_len=64, vocab_size=128))
    derived = derive(config, 1)
    kept = []
    for rms_norm in (None, rms_norm_reference):
        kernels = replace(choose_kernels(META, DTYPES["bf16"]), attention=flash_attention)
        kernels = kernels if rms_norm is None else replace(kernels, rms_norm=rms_norm)
        with fake_world(0, 1), StorageTracker() as storages:
            machine = build_machine(config, derived, create_context(config, derived, META), kernels=kernels)
            batch = replace(dry_batch(derived.shape, 1), loss_weight=torch.ones(()))
            before = storages.live
            loss = machine.stages[0](None, batch)
            kept.append(storages.live - before - loss.nbytes - 2 * FLASH_STATE)
            del loss
            assert storages.live == before
    assert kept[0] == planned(config, 1).activations_of_rank(0)
    assert kept[1] > 1.1 * kept[0]


@pytest.mark.parametrize(("preset", "pp_rank"), STAGES)
def test_calls_and_bytes_of_a_step_are_what_the_plan_says(preset, pp_rank):
    rank, config = class_rank(preset, pp_rank), one_step(preset)
    derived, trace = derive(config, WORLDS[preset]), traced(preset, rank)
    told = traffic_plan(config, derived).of_rank(pp_rank)
    assert counted(trace.calls, trace.groups["pp"]) == as_planned(told, trace.groups)
    hop = derived.grid.tp * derived.grid.dp
    for call in trace.calls:
        if call.kind in ("send", "receive"):
            assert rank in call.ranks
            assert abs(call.ranks[0] - call.ranks[1]) == hop


@pytest.mark.parametrize("preset", WORLDS)
def test_every_step_of_the_ramp_has_a_schedule_that_runs(preset):
    config, derived = recipe(preset), derive(recipe(preset), WORLDS[preset])
    sizes = derived.batches.sizes()
    assert len(sizes) == {"aquila2-34b": 32, "aquila2-70b": 22}[preset]
    for batch in sizes:
        microbatches, rest = divmod(batch, config.train.micro_batch * derived.grid.dp)
        assert rest == 0
        schedule = build_schedule(config.parallel.schedule, derived.grid.pp, microbatches)
        check(schedule, derived.stages.num_stages, microbatches)
        assert all(len(program) == 2 * microbatches for program in schedule.values())


def test_the_host_reads_ones_and_storages_are_let_go():
    with StorageTracker() as storages:
        x = torch.empty(4, 2, device=META)
        half: Tensor = x[:2]
        assert storages.live == 32
        assert x.sum().item() == 1
        assert x.tolist() == [[1, 1]] * 4
        del x
        assert storages.live == 32, "a view keeps the whole storage"
        del half
    assert storages.live == 0
    assert storages.peak >= 32


def test_memory_that_is_let_go_of_and_taken_again_is_counted():
    with StorageTracker() as storages:
        flat = Flat(4, torch.float32, META)
        view = flat.tensor[:2]
        flat.let_go()
        assert storages.live == 0
        flat.take()
        assert (storages.live, storages.peak) == (16, 16)
        other = torch.empty(3, dtype=torch.int8, device=META)
        flat.let_go()
        assert (storages.live, storages.peak) == (3, 19)
        del view, other, flat
    assert storages.live == 0
    Flat(4, torch.float32, torch.device("cpu")).let_go()  # nobody counts


def test_a_call_that_is_not_counted_is_refused():
    with fake_world(0, 2), CallRecorder(), pytest.raises(AssertionError, match="broadcast_ is not among the calls"):
        dist.broadcast(torch.ones(1), 0)
