"""What is planned of sharded buckets, beside what the optimizer does with them; real steps are counted elsewhere."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.optim import gathering
from megatron_aquila.plan import sharding
from megatron_aquila.plan.buckets import StageBucket
from megatron_aquila.plan.recompute import KEEP_ALL, Recompute, RecomputePlan
from megatron_aquila.plan.sharding import Gathered, Rounds, calls
from megatron_aquila.plan.stages import StagePlan
from megatron_aquila.plan.work import Passes


class Counted:
    """A bucket that counts how often it is gathered."""

    def __init__(self) -> None:
        self.times, self.is_whole = 0, False

    def begin_gather(self) -> None:
        self.times += not self.is_whole
        self.is_whole = True

    def finish_publish(self) -> None:
        assert self.is_whole

    def let_go(self) -> None:
        self.is_whole = False


@given(reads=st.lists(st.integers(0, 6), max_size=50), ahead=st.booleans())
def test_gathers_are_the_optimizers(reads: list[int], ahead: bool) -> None:
    sizes = [2**place for place in range(7)]
    buckets: list[Any] = [Counted() for _ in sizes]
    real = gathering.Gathering(buckets, ahead=ahead)
    planned = Gathered([StageBucket(0, (place,), size, True) for place, size in enumerate(sizes)], ahead=ahead)
    for place in reads:
        real.read(buckets[place])
        planned.read(place)
        assert planned.elements == sum(size for size, bucket in zip(sizes, buckets, strict=True) if bucket.is_whole), (
            "whole are the same ones at any time"
        )
    assert planned.times == [bucket.times for bucket in buckets]
    assert sharding.MOST_WHOLE == gathering.MOST_WHOLE


PLACES = (0, 3, 4, 5, 6, 8)  # of the embedding, a layer's matrices and the head
BUCKETS = [StageBucket(0, (place,), 10 if place == 6 else 4, True) for place in PLACES]
STEP = [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)]


def times(step: list[tuple[str, int, int]], *, overlap: bool = True, **settings: Any) -> tuple[tuple[int, ...], ...]:
    """Of one layer whose every matrix has a bucket of its own: how often each is reduced, and gathered."""
    plan = {"recompute": KEEP_ALL, "keeps_logits": False, "fuse_main_grads": True} | settings
    passes = Passes(stages=StagePlan((range(1),), (0,)), **plan)
    works = ((stage, work) for op, stage, m in step for work in passes.works(op, stage, m))
    reduced, gathered = zip(*calls(works, BUCKETS, overlap=overlap), strict=True)
    return reduced, gathered


def test_a_forward_and_a_backward_gather_each_matrix_once_a_way() -> None:
    assert times(STEP[:2])[1] == (2, 2, 2, 1, 1, 1)
    assert times(STEP)[1] == (3, 3, 3, 2, 2, 2), "the second forward finds three"
    assert times(STEP[:2], overlap=False)[1] == (1, 2, 2, 1, 1, 1), "no guess, no embedding"
    group = RecomputePlan(((Recompute(groups=(1,)),),))
    assert times(STEP[:2], recompute=group, overlap=False)[1] == (1, 3, 2, 2, 2, 1), "it runs again"


def test_a_round_of_gradients_is_reduced_a_microbatch() -> None:
    assert times(STEP)[0] == times(STEP, overlap=False)[0] == (2,) * 6


def test_while_one_is_summed_the_one_before_is_reduced() -> None:
    for overlap in (True, False):
        rounds = Rounds(BUCKETS, overlap=overlap)
        rounds.add(5)
        rounds.done(5)
        assert (rounds.elements, rounds.reducing) == (4, 4)
        rounds.settle()
        rounds.add(4)
        assert (rounds.elements, rounds.reducing) == ((14, 4) if overlap else (10, 0))
        rounds.done(4)
        assert (rounds.elements, rounds.reducing) == (10, 10), "the one before is in by then"
        rounds.add(4)
        assert (rounds.elements, rounds.reducing) == (10, 0), "what is reduced is awaited before it is added to"
        rounds.finish()
        assert (rounds.elements, rounds.times) == (0, [0, 0, 0, 0, 2, 1])


def test_what_is_added_to_the_head_ahead_of_its_backwards_goes_at_once() -> None:
    gpipe = [*STEP[::2], *STEP[1::2]]
    assert times(gpipe)[0] == (2, 2, 2, 2, 2, 1)
    assert times(gpipe, fuse_main_grads=False)[0] == (2,) * 6


def test_put_off_weight_gradients_are_reduced_when_they_are_paid() -> None:
    split = [("F", 0, 0), ("I", 0, 0)]
    assert times(split)[0] == (1, 0, 0, 0, 0, 1), "the embedding's is not put off; the rest of a step"
    assert times([*split, ("W", 0, 0)])[0] == (1,) * 6


@pytest.mark.parametrize("op", ["F", "B", "I"])
def test_every_pass_but_a_weight_gradients_reads(op: str) -> None:
    assert sum(times([(op, 0, 0)])[1]) > 0
    assert sum(times([("W", 0, 0)])[1]) == 0
