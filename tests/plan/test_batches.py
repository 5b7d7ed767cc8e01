from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.plan.batches import BatchPlan


def batches_of_the_ramp(plan):
    """The batch of every step that starts within the ramp's samples."""
    consumed, batches = 0, []
    while consumed <= plan.ramp[2]:
        batches.append(plan.global_batch_at(consumed))
        consumed += batches[-1]
    return batches


def test_the_ramps_of_the_recipes_take_the_published_steps():
    # Ramp lengths and increments of the public 34B and 70B recipes.
    for plan, steps, increments in [
        (BatchPlan(global_batch=1024, micro_batches=(1,) * 32, ramp=(32, 32, 2_000_000)), 8122, 31),
        (BatchPlan(global_batch=1056, micro_batches=(2,) * 24, ramp=(48, 48, 2_000_000)), 7235, 21),
    ]:
        batches = batches_of_the_ramp(plan)
        assert len(batches) == steps
        assert batches == sorted(batches)
        assert len(plan.sizes()) == increments + 1
        assert set(batches) <= set(plan.sizes())
        assert plan.global_batch_at(sum(batches)) == plan.global_batch


SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=5).map(tuple)


@given(SIZES, st.integers(1, 6), st.integers(0, 6), st.integers(0, 500), st.data())
def test_the_batch_only_grows_and_always_divides(sizes, start, increments, samples, data):
    unit = sum(sizes)
    plan = BatchPlan(global_batch=unit * (start + increments), micro_batches=sizes, ramp=(unit * start, unit, samples))
    here, further = sorted(data.draw(st.tuples(st.integers(0, 800), st.integers(0, 800))))
    assert plan.global_batch_at(here) <= plan.global_batch_at(further) <= plan.global_batch
    batch, microbatches = plan.batch_at(here)
    assert batch == microbatches * unit
    assert batch in plan.sizes()
    assert plan.global_batch_at(samples + 1) == plan.global_batch


def test_without_a_ramp_the_batch_is_constant():
    plan = BatchPlan(global_batch=1728, micro_batches=(2,) * 96)
    assert plan.batch_at(0) == plan.batch_at(10**9) == (1728, 9)
    assert plan.sizes() == (1728,)


def test_a_batch_that_does_not_divide_is_our_own_mistake():
    plan = BatchPlan(global_batch=10, micro_batches=(3, 1))
    with pytest.raises(AssertionError, match=r"a batch of 10 does not divide into rounds of \(3, 1\) samples"):
        plan.batch_at(0)
    with pytest.raises(AssertionError, match="a batch of 10 does not divide by 4"):
        plan.share_of(0).starts(0, 10)


@given(sizes=SIZES, count=st.integers(1, 4), consumed=st.integers(0, 99))
def test_the_replicas_shares_are_the_batch_in_its_order(sizes, count, consumed):
    plan = BatchPlan(global_batch=count * sum(sizes), micro_batches=sizes)
    shares = [plan.share_of(rank) for rank in range(len(sizes))]
    starts = [share.starts(consumed, plan.global_batch) for share in shares]
    assert [share.size for share in shares] == [plan.micro_batch_of(rank) for rank in range(len(sizes))]
    assert {len(one) for one in starts} == {plan.batch_at(0)[1]} == {count}
    rounds = [zip(now, shares, strict=True) for now in zip(*starts, strict=True)]
    dealt = [range(start, start + share.size) for one in rounds for start, share in one]
    assert [sample for part in dealt for sample in part] == [*range(consumed, consumed + plan.global_batch)]


@given(batch=st.integers(1, 8), start=st.integers(1, 8), samples=st.integers(1, 60), target=st.integers(0, 200))
def test_a_run_ends_with_a_whole_batch(batch: int, start: int, samples: int, target: int) -> None:
    plan = BatchPlan(global_batch=start + 2 * batch, micro_batches=(1,), ramp=(start, batch, samples))
    consumed = steps = 0
    while consumed < target:
        consumed, steps = consumed + plan.batch_at(consumed)[0], steps + 1
    assert plan.end_of_run(0, target) == consumed
    assert plan.num_steps(target) == steps
    assert plan.end_of_run(consumed, target) == consumed


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 6), st.integers(0, 300), st.integers(0, 40))
def test_runs_of_equal_batches_are_the_steps(start, increment, increments, samples, step):
    plan = BatchPlan(global_batch=start + increment * increments, micro_batches=(1,), ramp=(start, increment, samples))
    borders = [0]
    for _ in range(500):
        borders.append(borders[-1] + plan.global_batch_at(borders[-1]))
    found = list(plan.batches_from(step, borders[step]))
    assert found[0][:2] == (step, borders[step])
    assert found[-1][2] == plan.global_batch
    assert all(one[2] < other[2] for one, other in pairwise(found))
    for number in range(step, 500):
        before, first, size = [one for one in found if one[0] <= number][-1]
        assert first + (number - before) * size == borders[number]
