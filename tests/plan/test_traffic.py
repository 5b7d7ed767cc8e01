import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.commands import config as command
from megatron_aquila.config.derive import derive, traffic_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.model.aquila import build_stages
from megatron_aquila.optim.groups import plan_buckets
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.params import Constant, ParamInfo
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.buckets import ParameterSize, stage_buckets, stage_parameters
from megatron_aquila.plan.flops import num_params
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.stages import plan_stages
from megatron_aquila.plan.traffic import Traffic, TrafficPlan
from megatron_aquila.train import build, corpus, resume, start
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.launcher import Launch, read_launch
from megatron_aquila.train.step import train_step
from megatron_aquila.verify.dry import Call, CallRecorder
from tests.plan.calls import as_planned, counted
from tests.plan.shapes import AQUILA_7B, AQUILA_34B, aquila
from tests.train.runs import split, tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "communication.md"


def calls_of_a_step(config: RunConfig) -> tuple[list[Call], dict[str, tuple[int, ...]]]:
    """What a real step says on this rank, and the ranks of its groups. Collective."""
    launch = read_launch() if torch.distributed.is_initialized() else Launch()
    derived = derive(config, launch.world_size)
    ctx = build.create_context(config, derived, torch.device("cpu"))
    identity = corpus.identify(config) if ctx.rank == 0 else None
    checkpoint = start.resolve_checkpoint(config.checkpoint, ctx.world)
    begin = agreed(lambda: start.find_start(config, derived, checkpoint, identity), ctx.world)
    machine = build.build_machine(config, derived, ctx)
    data = corpus.build_corpus(config, derived, ctx, launch, segments=begin.state.index_segments, identity=identity)
    resume.load_weights(machine, begin)
    with CallRecorder() as recorder:
        train_step(machine, data, begin.state, stop_requested=False)
    data.close()
    return recorder.calls, {name: getattr(ctx, name).ranks for name in GROUPS}


GROUPS = ("tp", "cp", "pp", "dp_cp", "shards", "copies", "world")
SHARDED = [
    {"zero": 2},
    {"zero": 3},
    {"zero": 3, "overlap": False},
    {"zero": 3, "recompute": "full"},
    {"zero": 2, "schedule": "gpipe"},
    {"zero": 3, "schedule": "gpipe", "loss_chunk_tokens": 0, "deterministic_reduce": True},
    {"zero": 3, "schedule": "zb-h1", "fuse_main_grads": False, "recompute": "selective"},
]
LAYOUTS = [  # world, split, type: weights and gradients of bf16 differ in size
    (1, {}, "bf16"),
    (2, {"tp": 2}, "bf16"),
    (2, {"tp": 2, "sequence": True}, "bf16"),
    (2, {"tp": 2, "loss_chunk_tokens": 5}, "bf16"),
    (2, {"tp": 2, "sequence": True, "loss_chunk_tokens": 0}, "bf16"),
    (2, {"pp": 2}, "bf16"),
    (2, {}, "bf16"),
    (4, {"pp": 2}, "fp32"),
    (4, {"tp": 2, "pp": 2, "sequence": True}, "fp32"),
    (8, {"tp": 2, "pp": 2}, "fp64"),
    (8, {"tp": 2, "pp": 2, "sequence": True}, "bf16"),
    (2, {"deterministic_reduce": True, "bucket_mib": 1 / 64}, "fp32"),
    (2, {"grad_reduce": "bf16"}, "bf16"),
    (4, {"tp": 2, "sequence": True, "overlap": False, "fuse_main_grads": False}, "bf16"),
    (2, {"pp": 2, "chunks": 2, "stage_layers": (0, 1, 1, 1)}, "fp32"),
    (2, {"pp": 2, "schedule": "zb-v", "stage_layers": (1, 1, 1, 0)}, "fp32"),
    (2, {"tp": 2, "recompute": "full"}, "bf16"),
    (2, {"tp": 2, "sequence": True, "recompute": "full"}, "bf16"),
    (2, {"tp": 2, "sequence": True, "recompute": "selective"}, "bf16"),
    (2, {"context": 2}, "bf16"),
    (2, {"context": 2, "context_method": "ulysses"}, "bf16"),
    (4, {"context": 4, "context_method": "ulysses", "recompute": "full"}, "fp32"),
    (4, {"context": 2, "recompute": "full"}, "bf16"),
    (4, {"context": 2, "pp": 2, "overlap": False, "recompute_modules": ("attention",)}, "bf16"),
    *((2, {"bucket_mib": 1 / 64} | sharded, "fp64") for sharded in SHARDED),
    (4, {"zero": 3, "pp": 2, "bucket_mib": 1 / 256}, "bf16"),
    (4, {"zero": 3, "pp": 2, "schedule": "zb-v", "stage_layers": (1, 1, 1, 0), "bucket_mib": 1 / 256}, "fp32"),
    (4, {"zero": 2, "pp": 2, "chunks": 2, "stage_layers": (0, 1, 1, 1), "bucket_mib": 1 / 64}, "fp32"),
    (4, {"context": 2, "tp": 2, "sequence": True, "recompute_modules": ("norms", "attention")}, "fp64"),
    (4, {"zero_group": 2}, "bf16"),
    (4, {"zero_group": 1, "grad_reduce": "bf16"}, "bf16"),
    (4, {"zero_group": 2, "zero": 3, "bucket_mib": 1 / 64}, "bf16"),
    (4, {"zero_group": 2, "zero": 2, "deterministic_reduce": True, "context": 2, "grad_reduce": "bf16"}, "bf16"),
    (8, {"zero_group": 2, "zero": 3, "pp": 2, "overlap": False, "bucket_mib": 1 / 64}, "fp32"),
]


@pytest.mark.parametrize(("world", "layout", "precision"), LAYOUTS)
def test_a_real_step_makes_the_planned_calls_and_no_other(world, layout, precision, tmp_path, pool):
    names = ("recompute", "recompute_modules", "loss_chunk_tokens")
    settings = {name: layout[name] for name in names if name in layout}
    settings |= {"recompute": "selective"} if "recompute_modules" in layout else {}
    config = split(tiny_config(tmp_path), **{name: value for name, value in layout.items() if name not in settings})
    config = replace(config, train=replace(config.train, precision=precision, **settings))
    derived = derive(config, world)
    plan = traffic_plan(config, derived, run_schedule(config, derived))
    for rank, (calls, groups) in enumerate(pool(world).run(calls_of_a_step, config)):
        rows = plan.of_rank(plan.grid.coords(rank)["pp"])
        assert counted(calls, groups["pp"], groups["cp"]) == as_planned(rows, groups), f"rank {rank}"
        assert bool(calls) == (world > 1)


def test_a_call_too_many_or_too_few_is_seen(tmp_path, pool):
    """The check's own mutants: another schedule of calls, one more byte, another group."""
    config = split(tiny_config(tmp_path), tp=2)
    calls, groups = pool(2).run(calls_of_a_step, config)[0]
    sequence = split(config, tp=2, sequence=True)
    wrong = [
        traffic_plan(sequence, derive(sequence, 2)).of_rank(0),
        traffic_plan(config, derive(config, 2)).of_rank(0)[1:],
        replace(traffic_plan(config, derive(config, 2)), num_sources=1).of_rank(0),
    ]
    for rows in wrong:
        assert counted(calls, groups["pp"]) != as_planned(rows, groups)


def plan(shape, *, tp=1, dp=1, pp=1, **settings):
    grid = RankGrid(tp=tp, dp=dp, pp=pp)
    settings = {"micro_batch": 1, "num_microbatches": 8} | settings
    return TrafficPlan(shape=shape, grid=grid, stages=plan_stages(shape, pp), **settings)


def total(rows, **where):
    rows = [row for row in rows if all(getattr(row, name) == value for name, value in where.items())]
    return sum(row.count for row in rows), sum(row.num_bytes for row in rows)


def test_a_world_of_one_says_nothing():
    assert plan(AQUILA_7B).of_rank(0) == ()


def test_sequence_parallel_sends_half_as_much_again():
    """Two all-reduces cost what two gathers and two scatters do; backward gathers the columns' inputs once more."""
    rows = plan(AQUILA_34B, tp=4).of_rank(0)
    split_rows = plan(AQUILA_34B, tp=4, sequence_parallel=True).of_rank(0)

    def sent(rows, what):
        return sum(row.sent_bytes for row in rows if row.what == what)

    assert sent(split_rows, "layers forward") == sent(rows, "layers forward")
    assert sent(split_rows, "layers backward") * 2 == sent(rows, "layers backward") * 3
    hidden = 4096 * 6144 * 2
    assert total(rows, what="layers forward") == (60 * 2 * 8, 60 * 2 * 8 * hidden)
    assert total(split_rows, what="layers backward", kind="all-gather") == (60 * 4 * 8, 60 * 4 * 8 * hidden)


def test_messages_of_the_middle_and_of_the_ends():
    rows = [plan(AQUILA_34B, tp=4, pp=4, sequence_parallel=True).of_rank(rank) for rank in range(4)]
    message = 1024 * 6144 * 2
    assert [total(one, kind="send") for one in rows] == [(k * 8, k * 8 * message) for k in (1, 2, 2, 1)]
    assert [total(one, kind="receive") for one in rows] == [(k * 8, k * 8 * message) for k in (1, 2, 2, 1)]
    assert (
        total(rows[0], what="activations", kind="receive") == total(rows[3], what="activations", kind="send") == (0, 0)
    )


def test_two_stages_of_one_rank_do_not_send_to_each_other():
    loop = replace(plan_stages(AQUILA_34B, 4), stage_rank=(0, 1, 0, 1))
    in_v = replace(loop, stage_rank=(0, 1, 1, 0))
    looped, folded = (replace(plan(AQUILA_34B, pp=2), stages=stages) for stages in (loop, in_v))
    assert [total(looped.of_rank(rank), kind="send")[0] for rank in (0, 1)] == [3 * 8, 3 * 8]
    assert [total(folded.of_rank(rank), kind="send")[0] for rank in (0, 1)] == [2 * 8, 2 * 8]


def test_replicas_move_every_gradient_and_weight_once():
    gradients, weights, *_ = plan(AQUILA_7B, dp=8).of_rank(0)
    count = num_params(replace(AQUILA_7B, vocab_size=AQUILA_7B.padded_vocab_size))
    assert (gradients.kind, weights.kind) == ("reduce-scatter", "all-gather")
    assert gradients.num_bytes == 4 * count
    assert weights.num_bytes == 2 * count
    assert gradients.sent_bytes == 4 * count * 7 // 8


def test_what_leaves_a_rank():
    row = Traffic(what="", kind="all-reduce", group="tp", group_size=4, count=1, num_bytes=400)
    kinds = {"all-reduce": 600, "all-gather": 300, "reduce-scatter": 300, "send": 400, "receive": 0}
    assert {kind: replace(row, kind=kind).sent_bytes for kind in kinds} == kinds


@given(
    sizes=st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=20),
    limit=st.integers(1, 2000),
    num_shards=st.integers(1, 5),
)
def test_buckets_are_the_optimizers(sizes, limit, num_shards):
    infos = [
        ParamInfo(param=nn.Parameter(torch.empty(size)), stage=0, weight_decay=decays, init=Constant(0), parts=())
        for size, decays in sizes
    ]
    layouts = plan_buckets(infos, bucket_bytes=4 * limit, num_shards=num_shards)
    parameters = [ParameterSize(*size) for size in sizes]
    planned = stage_buckets(parameters, stage=0, limit=limit, num_shards=num_shards)
    place = {id(info): place for place, info in enumerate(infos)}
    real = [(layout.size, tuple(place[id(slot.info)] for slot in reversed(layout.slots))) for layout in layouts]
    assert [(bucket.elements, bucket.places) for bucket in planned] == real[::-1], "sizes and order"


def test_parameters_of_a_stage_are_the_models():
    shape = replace(aquila(4, 64, 4, 2, 64, None, 8, 16), vocab_size=61, padded_vocab_size=64)
    for stage, stages in [(0, plan_stages(shape, 1)), (0, plan_stages(shape, 2)), (1, plan_stages(shape, 2))]:
        placement = Placement(
            tp=Group("tp", 1, 2, (0, 1), None), sequence_parallel=True, dtype=torch.float32, device=torch.device("meta")
        )
        kernels = choose_kernels(placement.device, placement.dtype)
        built = build_stages(shape, stages, pp_rank=stage, placement=placement, kernels=kernels)[stage]
        real = [ParameterSize(info.param.numel(), info.weight_decay) for info in built.param_infos()]
        assert real == list(stage_parameters(shape, stages, stage, 2))


EXAMPLES = re.findall(r"```text\n\$ aquila (.*)\n((?:.*\n)*?)```", PAGE.read_text())


@pytest.mark.parametrize(("line", "shown"), EXAMPLES)
def test_the_page_shows_what_the_command_prints(line, shown, capsys):
    words, _, only = line.partition(" | ")
    assert only == "sed -n /communication/,/sums/p"
    assert command.main(words.split()[1:]) == 0
    printed = capsys.readouterr().out
    begin, end = printed.index("communication of a step"), printed.index("loss sums")
    assert shown == printed[begin : printed.index("\n", end) + 1]


def test_the_page_has_examples():
    assert len(EXAMPLES) == 2
