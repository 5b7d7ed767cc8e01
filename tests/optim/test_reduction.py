"""Gradients reduced within backward, weights gathered behind the step, and the ways of summing over replicas."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.optim import buckets
from megatron_aquila.optim.buckets import Bucket, Reduction
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.rules import Sgd
from megatron_aquila.parallel.collectives import Pending, begin_all_gather_flat_
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.optim.toys import SHAPES, draw, give_gradients, toy_infos, weights_of

Pools = Callable[[int], WorkerPool]
BUCKETS = {"one": 10**6, "some": 1000, "each": 1}  # bytes
STEPS, MICROBATCHES = 3, 4  # microbatches of a step over all replicas
PLAIN, OVERLAPPED, IN_ORDER = Reduction(), Reduction(overlap=True), Reduction(in_rank_order=True)


def make(
    dp: int, reduction: Reduction, bucket_bytes: int, dtype: torch.dtype = torch.float64
) -> tuple[list[ParamInfo], DistributedOptimizer, int]:
    ctx = ParallelContext.create(RankGrid(dp=dp), torch.device("cpu"))
    infos = toy_infos(dtype)
    optimizer = DistributedOptimizer(infos, ctx, rule=Sgd(), bucket_bytes=bucket_bytes, reduction=reduction)
    return infos, optimizer, ctx.rank


def train(dp: int, reduction: Reduction, bucket_bytes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters after some unclipped steps; a replica's microbatches are neighbours, as a loader's are."""
    infos, optimizer, rank = make(dp, reduction, bucket_bytes, dtype)
    share = MICROBATCHES // dp
    for step in range(STEPS):
        optimizer.begin_step(share)
        for microbatch in range(rank * share, rank * share + share):
            give_gradients(infos, step, microbatch)
        optimizer.reduce_gradients()
        optimizer.step(0.1, optimizer.clip(0.0))
    return weights_of(infos, optimizer)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize("in_rank_order", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_overlap_changes_no_bit(pool: Pools, dp: int, dtype: torch.dtype | None, in_rank_order: bool) -> None:
    for size in BUCKETS.values():
        runs = [
            pool(dp).run(train, dp, Reduction(dtype=dtype, in_rank_order=in_rank_order, overlap=overlap), size)
            for overlap in (False, True)
        ]
        assert all(same(apart, together) for apart, together in zip(*runs, strict=True)), size


def test_sums_in_rank_order_depend_on_no_bucket_and_are_one_processs(pool: Pools) -> None:
    """With a microbatch a rank the replicas' sum is the sum of one process that ran the microbatches in order."""
    (alone,) = pool(1).run(train, 1, PLAIN, BUCKETS["one"])
    for size in BUCKETS.values():
        assert all(same(found, alone) for found in pool(4).run(train, 4, IN_ORDER, size)), size
    plain = [pool(4).run(train, 4, PLAIN, size)[0] for size in BUCKETS.values()]
    assert not all(same(found, alone) for found in plain), "the backend's own order would do, here"
    assert not all(same(found, plain[0]) for found in plain), "the backend's own order would do for all buckets, here"


def reduced(dp: int, reduction: Reduction) -> list[tuple[str, int, Tensor]]:
    infos, optimizer, rank = make(dp, reduction, BUCKETS["some"], torch.bfloat16)
    optimizer.begin_step(1)
    give_gradients(infos, 0, rank)
    optimizer.reduce_gradients()
    return [(flat.info.name, flat.start, view.clone()) for kind, flat, view in optimizer.ranges() if kind == "grad"]


@pytest.mark.parametrize("dp", [2, 4])
def test_gradients_that_travel_in_bf16_are_as_near_as_its_roundings(pool: Pools, dp: int) -> None:
    """Each of dp numbers, and each of the dp - 1 sums but the last one's operand, is rounded to 8 significant bits."""
    grads = {
        name: [draw(shape, i, 0, rank).bfloat16().double().flatten() for rank in range(dp)]
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    worst = 0.0
    for ranges in pool(dp).run(reduced, dp, Reduction(dtype=torch.bfloat16)):
        for name, start, found in ranges:
            terms = torch.stack([grad[start : start + found.numel()] for grad in grads[name]])
            off = (found.double() - terms.sum(0)).abs()
            assert (off <= 1.02 * dp * 2**-8 * terms.abs().sum(0)).all(), name
            worst = max(worst, float((off / terms.abs().sum(0)).max()))
    assert worst > 2**-12, "in float32 it would be 2^-24"


@contextmanager
def logged(events: list[str]) -> Iterator[None]:
    """``events`` tells of each bucket, by its first parameter, when its collectives begin and end."""

    def told(name: str, word: str) -> object:
        real = getattr(Bucket, name)

        def method(self: Bucket) -> None:
            if name != "finish_publish" or self._gathering is not None:
                events.append(f"{word} {self.layout.slots[0].info.name}")
            real(self)

        return patch.object(Bucket, name, method)

    with (
        told("begin_reduce", "reduce"),
        told("finish_reduce", "reduced"),
        told("begin_publish", "gather"),
        told("finish_publish", "gathered"),
    ):
        yield


NAMES = list(SHAPES)


def one_by_one(infos: Sequence[ParamInfo], order: Sequence[str], events: list[str]) -> None:
    for name in order:
        give_gradients(infos, 0, skip=[other for other in NAMES if other != name])
        events.append(name)


def test_a_bucket_is_reduced_as_soon_as_its_last_gradient_is_there() -> None:
    infos, optimizer, _ = make(1, OVERLAPPED, BUCKETS["each"])
    events: list[str] = []
    backward = NAMES[::-1]
    with logged(events):
        optimizer.begin_step(2)
        one_by_one(infos, backward, events)
        assert events == backward, "the first of two microbatches completes nothing"
        events.clear()
        one_by_one(infos, backward, events)
        assert events == [word for name in backward for word in (f"reduce {name}", name)]
        events.clear()
        optimizer.reduce_gradients()
        assert events == [f"reduced {name}" for name in backward], "nothing was left to begin"
        events.clear()
        optimizer.step(0.1, optimizer.clip(0.0))
        assert events == [f"gather {name}" for name in NAMES], "what forward reads first comes first"
        events.clear()
        optimizer.wait_for_weights([infos[1].param])
        optimizer.wait_for_weights([infos[1].param])
        assert events == [f"gathered {NAMES[1]}"]
        optimizer.ranges()
        assert len(events) == len(NAMES)


def test_without_overlap_everything_is_begun_after_backward() -> None:
    infos, optimizer, _ = make(1, PLAIN, BUCKETS["each"])
    events: list[str] = []
    with logged(events):
        optimizer.begin_step(1)
        one_by_one(infos, NAMES[::-1], events)
        optimizer.reduce_gradients()
    assert events[: len(NAMES)] == NAMES[::-1]


@given(order=st.permutations(NAMES), unreached=st.sets(st.sampled_from(NAMES)), size=st.sampled_from([*BUCKETS]))
def test_reductions_begin_in_one_order_whatever_backward_does(order: list[str], unreached: set[str], size: str) -> None:
    """All replicas must agree on it, even if one's backward came by its parameters in another order, or not at all."""
    infos, optimizer, _ = make(1, OVERLAPPED, BUCKETS[size])
    events: list[str] = []
    with logged(events):
        optimizer.begin_step(1)
        one_by_one(infos, [name for name in order if name not in unreached], [])
        optimizer.reduce_gradients()
    begun = [event.removeprefix("reduce ") for event in events if event.startswith("reduce ")]
    assert begun == [bucket.layout.slots[0].info.name for bucket in optimizer._buckets]


def test_partial_sums_over_tp_are_reduced_last() -> None:
    infos = [replace(info, sums_over_tp=not info.weight_decay) for info in toy_infos(torch.float64)]
    optimizer = DistributedOptimizer(infos, ParallelContext.single(), rule=Sgd(), bucket_bytes=1, reduction=OVERLAPPED)
    events: list[str] = []
    with logged(events):
        optimizer.begin_step(1)
        give_gradients(infos, 0)
        assert events == ["reduce square", "reduce wide", "reduce matrix"]
        optimizer.reduce_gradients()
    assert events[3:5] == ["reduce bias", "reduce norm"]


def test_a_gradient_too_many_is_an_error() -> None:
    """It would be lost, or added to a sum that is under way."""
    infos, optimizer, _ = make(1, OVERLAPPED, BUCKETS["each"])
    optimizer.begin_step(1)
    give_gradients(infos, 0)
    with pytest.raises(AssertionError, match="added to a sum that is being reduced, of one of norm"):
        give_gradients(infos, 1, skip=[name for name in NAMES if name != "norm"])


def test_a_reduction_that_never_began_cannot_be_finished() -> None:
    _, optimizer, _ = make(1, PLAIN, BUCKETS["one"])
    with pytest.raises(AssertionError, match="never begun"):
        optimizer._buckets[0].finish_reduce()


def gathered_late(out: Tensor, shard: Tensor, group: Group, *, overlap: bool) -> Pending:
    """An all-gather that brings nothing before it is waited for: every wait that is forgotten shows."""

    def gather() -> None:
        begin_all_gather_flat_(out, shard, group, overlap=False).wait()

    return Pending(out, finish=gather)


def weights_with_late_gathers(dp: int, waits: bool) -> bool:
    """Whether the weights after a step are the right ones, with and without the wait."""
    expected = train_once(dp, PLAIN)
    with patch.object(buckets, "begin_all_gather_flat_", gathered_late):
        found = train_once(dp, OVERLAPPED, waits=waits)
    return same(found, expected)


def train_once(dp: int, reduction: Reduction, *, waits: bool = True) -> dict[str, Tensor]:
    infos, optimizer, rank = make(dp, reduction, BUCKETS["some"])
    optimizer.begin_step(1)
    give_gradients(infos, 0, rank)
    optimizer.reduce_gradients()
    optimizer.step(0.1, optimizer.clip(0.0))
    if waits:
        return weights_of(infos, optimizer)
    return {info.name: info.param.detach().clone() for info in infos}


def test_weights_read_without_the_wait_are_stale(pool: Pools) -> None:
    assert pool(2).run(weights_with_late_gathers, 2, True) == [True, True]
    assert pool(2).run(weights_with_late_gathers, 2, False) == [False, False]
