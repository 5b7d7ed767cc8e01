"""The table of what is recomputed, FlagScale's notations, and what a second forward costs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.plan.flops import attention_flops, flops_per_token, head_flops, layer_matmul_params
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.memory import MemoryPlan
from megatron_aquila.plan.recompute import (
    KEEP_ALL,
    MODULES,
    Recompute,
    RecomputePlan,
    per_stage,
    plan_recompute,
    recomputed_flops,
)
from megatron_aquila.plan.stages import plan_stages
from tests.plan.shapes import AQUILA_7B, AQUILA_34B

STAGES = plan_stages(AQUILA_34B, 4, (15, 16, 16, 13))
NOTHING = Recompute()


def sizes(plan):
    return [[at.groups for at in stage] for stage in plan.stages]


def test_nothing_is_recomputed_unless_asked():
    assert KEEP_ALL.at(3, 7) == plan_recompute(STAGES, kind="none").at(3, 7) == NOTHING


def test_selective_is_the_same_everywhere():
    plan = plan_recompute(STAGES, kind="selective", modules=["attention"])
    assert {plan.at(stage, microbatch) for stage in range(4) for microbatch in range(9)} == {
        Recompute(modules=frozenset({"attention"}))
    }


def test_uniform_groups_hold_every_layer_and_block_the_first():
    assert sizes(plan_recompute(STAGES, kind="full")) == [[(1,) * n] for n in (15, 16, 16, 13)]
    assert sizes(plan_recompute(STAGES, kind="full", num_layers=6)) == [
        [(6, 6, 3)],
        [(6, 6, 4)],
        [(6, 6, 4)],
        [(6, 6, 1)],
    ]
    block = plan_recompute(STAGES, kind="full", method="block", num_layers=14)
    assert sizes(block) == [[(1,) * 14], [(1,) * 14], [(1,) * 14], [(1,) * 13]]


@given(st.integers(1, 20), st.sampled_from(["uniform", "block"]))
def test_no_layer_is_recomputed_twice(num_layers, method):
    plan = plan_recompute(STAGES, kind="full", method=method, num_layers=num_layers)
    for stage, layers in enumerate(STAGES.layers):
        groups = plan.at(stage, 0).groups
        assert sum(groups) == (len(layers) if method == "uniform" else min(num_layers, len(layers)))
        assert all(groups)


def test_stages_and_microbatches_differ_in_flagscales_numbers():
    """The lists of FlagScale's own test: 30 microbatches, then 2; stage 0 never, stage 1 uniform, stage 2 block."""
    stages = plan_stages(replace(AQUILA_34B, num_layers=12), 3, (6, 2, 4))
    plan = plan_recompute(
        stages,
        kind="full",
        granularities=per_stage(["1, 30, 0, 2, 0", "1, 30, 1, 2, 1", "[1, 30, 1, 2, 1]"]),
        methods=per_stage(["1, 30, 0, 2, 0", "1, 30, 0, 2, 0", "1, 30, 1, 2, 1"]),
        layers=per_stage(["1, 30, 2, 2, 2", "1, 30, 1, 2, 0", "1, 30, 2, 2, 3"]),
    )
    assert {plan.at(0, microbatch) for microbatch in range(32)} == {NOTHING}
    assert (plan.at(1, 29).groups, plan.at(1, 30).groups) == ((1, 1), ())
    assert (plan.at(2, 0).groups, plan.at(2, 31).groups) == ((1, 1), (1, 1, 1))
    # v0.3's pairs, the same for every microbatch: a published script's "3 0 1 1" and "3 1 1 0".
    pairs = plan_recompute(
        STAGES, kind="full", methods=per_stage(["3", "0", "1", "1"]), layers=per_stage(["3", "1", "1", "0"])
    )
    assert [len(pairs.at(stage, 5).groups) for stage in range(4)] == [15, 16, 16, 0]
    assert per_stage(["22", "0"]) == ((0,),) * 22
    assert per_stage([]) == ()
    assert per_stage(["[1,", "30,0", ",2,", "1]", "3,", "32, 1"]) == ((0,) * 30 + (1, 1), *((1,) * 32,) * 3)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["3", "x"], "not made of whole numbers"),
        (["3", "1", "1"], "even number of words"),
        (["1, 30", "1, 1, 1"], "after the count of stages"),
        (["1,"], "not made of whole numbers"),
        (["0", "1"], "counts are at least 1"),
        (["1, 0, 1"], "counts are at least 1"),
        (["2", "-1"], "values at least 0"),
    ],
)
def test_what_cannot_be_read_says_why(words, why):
    with pytest.raises(ValueError, match=why):
        per_stage(words)


def test_full_recomputation_is_a_third_less_the_last_projection():
    stages = plan_stages(AQUILA_7B, 1)
    forward = (flops_per_token(AQUILA_7B) - head_flops(AQUILA_7B)) / 3
    down = 2 * AQUILA_7B.hidden_size * AQUILA_7B.ffn_size
    for size, groups in ((1, 32), (8, 4), (32, 1)):
        found = recomputed_flops(AQUILA_7B, stages, plan_recompute(stages, kind="full", num_layers=size), 9)
        assert found.linears + found.attention == pytest.approx(forward - groups * down)
        assert found.linears == 2 * (32 * layer_matmul_params(AQUILA_7B)) - groups * down
    # Of the 7B, 5.1 % of a layer's 6 products a token go into the skipped projection; the rest of a third is run again.
    one = recomputed_flops(AQUILA_7B, stages, plan_recompute(stages, kind="full"), 9)
    assert (one.linears + one.attention) / flops_per_token(AQUILA_7B) == pytest.approx(0.247, abs=0.001)


def test_what_selective_recomputes_has_no_flops_but_attentions():
    stages = plan_stages(AQUILA_34B, 4)

    def of(*modules):
        return recomputed_flops(AQUILA_34B, stages, plan_recompute(stages, kind="selective", modules=modules), 3)

    assert of("norms", "swiglu").linears == of("norms", "swiglu").attention == of(*MODULES).linears == 0
    assert of(*MODULES).attention == pytest.approx(60 * attention_flops(6144, 4096) / 3)


def test_microbatches_count_by_their_share():
    everything = plan_recompute(STAGES, kind="full")
    half = RecomputePlan(tuple((NOTHING, stage[0]) for stage in everything.stages))
    whole, found = (recomputed_flops(AQUILA_34B, STAGES, plan, 2) for plan in (everything, half))
    assert (found.linears, found.attention) == (whole.linears / 2, whole.attention / 2)


def memory(recompute, *, schedule="1f1b", microbatches=32):
    return MemoryPlan(
        shape=AQUILA_34B,
        grid=RankGrid(tp=4, pp=4),
        stages=STAGES,
        micro_batch=1,
        order=build_schedule(schedule, 4, microbatches, 1),
        sequence_parallel=True,
        recompute=recompute,
    )


def test_memory_counts_the_microbatches_that_are_there_at_once():
    none, full = (memory(plan_recompute(STAGES, kind=kind)) for kind in ("none", "full"))
    tokens = AQUILA_34B.seq_len
    one = tokens * AQUILA_34B.hidden_size * 2 // 4  # a layer's input, in bf16, of one tensor rank
    rope = tokens * 2 * AQUILA_34B.head_dim * 4
    first = 15 * one + rope + 9 * tokens  # and the embedding's rows and which of them are here
    assert full.activations_of_rank(0) == 4 * first
    last_norm_and_loss = 2 * one + tokens // 4 * 4 + tokens * 4  # and each token's weight in the loss
    assert full.activations_of_rank(3) == 13 * one + rope + last_norm_and_loss
    layer = (none.activations_of_rank(2) // 2 - rope) // 16
    grown = full.of_rank(2).temporaries - none.of_rank(2).temporaries
    assert 0.7 * layer < grown < layer, "the fullest moment is when a part of the layer that ran again is free already"
    # The first three microbatches recompute, all others keep: of the four at once on stage 0 at most four keep.
    ends = RecomputePlan(((full.recompute.at(0, 0),) * 3 + (NOTHING,),) * 4)
    assert memory(ends).activations_of_rank(0) == none.activations_of_rank(0)
    only_four = memory(ends, microbatches=4).activations_of_rank(0)
    assert only_four == 3 * first + none.activations_of_rank(0) // 4


def test_an_owed_weight_gradient_keeps_what_recomputation_had_saved():
    """tests/verify/test_dry.py holds the bytes against traced steps."""

    def of_one(kind, stage):
        return memory(plan_recompute(STAGES, kind=kind), microbatches=1).activations_of_rank(stage)

    full = memory(plan_recompute(STAGES, kind="full"), schedule="zb-h1")
    for stage in range(4):
        whole, light = of_one("none", stage), of_one("full", stage)
        owed = full.activations_of_rank(stage) - (4 - stage) * light
        assert stage * whole < owed < (stage + 1) * 2 * whole
