"""What is planned of sharded buckets, beside what the optimizer does with them; real steps are counted elsewhere."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.optim import gathering
from megatron_aquila.plan import sharding
from megatron_aquila.plan.buckets import StageBucket
from megatron_aquila.plan.recompute import KEEP_ALL, Recompute, RecomputePlan
from megatron_aquila.plan.sharding import Held, ShardedMatrices, gathered
from megatron_aquila.plan.stages import StagePlan


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
    most = 0
    for place in reads:
        real.read(buckets[place])
        most = max(most, sum(size for size, bucket in zip(sizes, buckets, strict=True) if bucket.is_whole))
    assert gathered(reads, sizes, ahead=ahead) == Held(tuple(bucket.times for bucket in buckets), most)
    assert sharding.MOST_WHOLE == gathering.MOST_WHOLE


def one_layer(**settings: Any) -> ShardedMatrices:
    """Embedding, a layer and the head; every matrix has a bucket of its own, the one of the layer's last is larger."""
    buckets = [StageBucket(0, (place,), 10 if place == 6 else 4, True) for place in (0, 3, 4, 5, 6, 8)]
    plan = {"recompute": KEEP_ALL, "keeps_logits": False, "fuse_main_grads": True, "overlap": True} | settings
    stages = StagePlan((range(1),), (0,))
    return ShardedMatrices(stages=stages, buckets=buckets, num_pieces=2, **plan)


STEP = [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)]


def test_a_forward_and_a_backward_gather_each_matrix_once_a_way() -> None:
    assert one_layer().gathered(STEP[:2]) == Held((2, 2, 2, 1, 1, 1), 18)
    assert one_layer().gathered(STEP).times == (3, 3, 3, 2, 2, 2), "the second forward finds three"
    assert one_layer(overlap=False).gathered(STEP[:2]).times == (1, 2, 2, 1, 1, 1), "no guess, no embedding"
    group = RecomputePlan(((Recompute(groups=(1,)),),))
    assert one_layer(recompute=group, overlap=False).gathered(STEP[:2]).times == (1, 3, 2, 2, 2, 1), "it runs again"


def test_a_round_of_gradients_is_reduced_a_microbatch() -> None:
    """While one is summed the one before is reduced, into its half."""
    assert one_layer().reduced(STEP) == Held((2,) * 6, 10 + 4 + 10 // 2)
    assert one_layer(overlap=False).reduced(STEP) == Held((2,) * 6, 10 + 10 // 2)


def test_what_is_added_to_the_head_ahead_of_its_backwards_goes_at_once() -> None:
    gpipe = [*STEP[::2], *STEP[1::2]]
    assert one_layer().reduced(gpipe).times == (2, 2, 2, 2, 2, 1)
    assert one_layer(fuse_main_grads=False).reduced(gpipe).times == (2,) * 6


def test_put_off_weight_gradients_are_reduced_when_they_are_paid() -> None:
    split = [("F", 0, 0), ("I", 0, 0)]
    assert one_layer().reduced(split).times == (1, 0, 0, 0, 0, 1), "the embedding's is not put off; the rest of a step"
    assert one_layer().reduced([*split, ("W", 0, 0)]).times == (1,) * 6


@pytest.mark.parametrize("op", ["F", "B", "I"])
def test_every_pass_but_a_weight_gradients_reads(op: str) -> None:
    assert sum(one_layer().gathered([(op, 0, 0)]).times) > 0
    assert sum(one_layer().gathered([("W", 0, 0)]).times) == 0
