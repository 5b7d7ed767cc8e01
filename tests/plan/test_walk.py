"""The walk on its own; that it finds the peak of real steps is traced in tests/verify."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.memory import MemoryPlan
from megatron_aquila.plan.recompute import plan_recompute
from megatron_aquila.plan.stages import plan_stages
from tests.plan.shapes import aquila

SHAPE = replace(aquila(9, 256, 8, 4, 64, None, 8, 128), vocab_size=1000, padded_vocab_size=1008)
PARTS = range(5)


def plan(schedule: str = "1f1b", pp: int = 2, microbatches: int = 4, chunks: int = 1, kind="none", **others):
    stages = plan_stages(SHAPE, pp, chunks=chunks, schedule=schedule)
    return MemoryPlan(
        shape=SHAPE,
        grid=RankGrid(dp=4, pp=pp),
        stages=stages,
        micro_batch=1,
        order=build_schedule(schedule, pp, microbatches, chunks),
        recompute=plan_recompute(stages, kind=kind),
        bucket_bytes=2**19,
        **others,
    )


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 2), ("zb-h1", 1), ("zb-v", 2)])
@settings(max_examples=15)
@given(
    kind=st.sampled_from(["none", "selective", "full"]),
    zero=st.integers(1, 3),
    loss_chunk_tokens=st.sampled_from([None, 0]),
    fuse_main_grads=st.booleans(),
    sequence_parallel=st.booleans(),
)
def test_a_step_frees_what_it_takes_and_no_part_has_more_than_at_its_own_fullest(schedule, chunks, **drawn) -> None:
    """That nothing is left over is asserted by the walk itself."""
    memory = plan(schedule, chunks=chunks, microbatches=3, **drawn)
    for rank in range(2):
        walk, program = memory._walk(rank), memory.order[rank]
        fullest = walk.fullest(program)
        widest = [walk.fullest(program, by=lambda moment, part=part: moment[part])[part] for part in PARTS]
        assert all(0 <= fullest[part] <= widest[part] for part in PARTS)
        assert max(widest) <= sum(fullest) <= sum(widest)


def test_what_is_never_freed_is_an_error() -> None:
    walk = plan()._walk(0)
    with pytest.raises(AssertionError, match="bytes of activations and 0 of logits are never freed"):
        walk.fullest([("F", 0, 0)])


def test_at_the_last_gradient_of_a_step_hardly_an_activation_is_left() -> None:
    """Where the vocabulary is large beside a microbatch, the embedding's gradient is the fullest moment."""
    wide = replace(SHAPE, vocab_size=32000, padded_vocab_size=32000)
    memory = replace(plan("1f1b", pp=1, microbatches=1, loss_chunk_tokens=32), shape=wide)
    fullest = memory._walk(0).fullest(memory.order[0])
    assert fullest.activations < memory.activations_of_rank(0) / 10
    assert fullest.temporaries > 6 * wide.padded_vocab_size * wide.hidden_size


def test_gathered_weights_and_gradients_of_all_layers_do_not_meet() -> None:
    one, three = (plan("zb-h1", zero=zero) for zero in (1, 3))
    walk = three._walk(0)
    found = walk.fullest(three.order[0])
    apart = [walk.fullest(three.order[0], by=lambda moment, part=part: moment[part])[part] for part in PARTS]
    assert sum(found) < 0.97 * sum(apart), "the sum of maxima is no moment of the step"
    assert one._walk(0).fullest(one.order[0])[:2] == (0, 0)


def test_messages_are_under_way_while_others_compute() -> None:
    overlapped, one_by_one = (plan(pp=3, overlap=overlap) for overlap in (True, False))
    first, last = ([*overlapped._walk(rank)._messages(overlapped.order[rank])] for rank in (0, 2))
    assert [str(action) for action in overlapped.order[0]][:4] == ["0F0", "0F1", "0F2", "0B0"]
    assert first[:4] == [1, 2, 3, 3], "sent; two at most; and beside the third forward the gradient that comes"
    assert [str(action) for action in overlapped.order[2]][:2] == ["2F0", "2B0"]
    assert last[:2] == [0, 2], "its own, and the next microbatch's input"
    assert [*one_by_one._walk(0)._messages(one_by_one.order[0])][:4] == [1, 2, 2, 3]


def test_stages_of_one_rank_leave_each_other_what_they_have() -> None:
    memory = plan("zb-v", pp=1, chunks=2)
    program = [("F", 0, 0), ("F", 0, 1), ("F", 1, 0), ("I", 1, 0), ("I", 0, 0), ("W", 1, 0)]
    assert [*memory._walk(0)._messages(program)] == [1, 2, 1, 2, 2, 1]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_stage_that_is_the_embedding_alone_has_a_plan(zero: int) -> None:
    """It has no norm, so nothing that ZeRO-2 leaves whole."""
    stages = plan_stages(SHAPE, 3, layers=(0, 4, 5))
    memory = replace(plan(pp=3, zero=zero), stages=stages)
    assert memory.of_rank(0).total > 0
