"""Shards within groups of replicas, and their sums joined over the groups: the updates of one group of all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_aquila.optim.buckets import Bucket, Reduction, Sharding
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.rules import Sgd
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.optim.toys import give_gradients, toy_infos, weights_of

Pools = Callable[[int], WorkerPool]
LEVELS = {1: Sharding(), 2: Sharding(gradients=True), 3: Sharding(gradients=True, weights=True)}
DP, MICROBATCHES = 4, 2
Shares = dict[str, Tensor]


def make(
    group: int | None, level: int, reduction: Reduction, dtype: torch.dtype
) -> tuple[list[ParamInfo], DistributedOptimizer, ParallelContext]:
    """Matrices have a bucket each."""
    ctx = ParallelContext.create(RankGrid(dp=DP, zero_group=group), torch.device("cpu"))
    infos = toy_infos(dtype)
    optimizer = DistributedOptimizer(
        infos, ctx, rule=Sgd(), bucket_bytes=1, reduction=reduction, sharding=LEVELS[level]
    )
    optimizer.refresh_masters()
    return infos, optimizer, ctx


def train(
    group: int | None, level: int, reduction: Reduction, dtype: torch.dtype = torch.float64, max_norm: float = 0.0
) -> tuple[Shares, Shares, float]:
    """Parameters after two steps, this rank's shares of the last gradients, and the last norm."""
    infos, optimizer, ctx = make(group, level, reduction, dtype)
    for step in range(2):
        optimizer.begin_step(MICROBATCHES)
        for microbatch in range(MICROBATCHES):
            optimizer.wait_for_weights([info.param for info in infos])
            give_gradients(infos, step, microbatch, ctx.rank)
        optimizer.reduce_gradients()
        clip = optimizer.clip(max_norm)
        optimizer.step(0.1, clip)
    shares = {f"{o.info.name}@{o.start}": v.clone() for kind, o, v in optimizer.ranges() if kind == "grad"}
    return weights_of(infos, optimizer), shares, clip.norm.item()


def apart(ours: Shares, theirs: Shares) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", [1, 2])
def test_updates_are_those_of_one_group(pool: Pools, group: int, level: int) -> None:
    expected = pool(DP).run(train, None, level, Reduction(), torch.float64, 1.0)
    for overlap in (False, True):
        found = pool(DP).run(train, group, level, Reduction(overlap=overlap), torch.float64, 1.0)
        for (ours, _, norm), (theirs, _, right) in zip(found, expected, strict=True):
            assert apart(ours, theirs) <= 1e-14
            assert norm == pytest.approx(right, rel=1e-14)
        for rank, (_, shares, _) in enumerate(found):
            copy = found[rank % group][1]
            assert shares.keys() == copy.keys()
            assert all(torch.equal(shares[name], copy[name]) for name in shares), "copies of a shard differ"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("travels", [None, torch.bfloat16], ids=str)
def test_in_rank_order_they_are_so_bit_by_bit(pool: Pools, travels: torch.dtype | None, level: int) -> None:
    whole, *_ = pool(DP).run(train, None, level, Reduction(in_rank_order=True, dtype=travels), torch.float32)
    for group in (1, 2):
        for overlap in (False, True):
            how = Reduction(in_rank_order=True, dtype=travels, overlap=overlap)
            for found, _, _ in pool(DP).run(train, group, level, how, torch.float32):
                assert all(torch.equal(found[name], whole[0][name]) for name in found)


def test_by_default_the_order_of_a_sum_shows(pool: Pools) -> None:
    """Else the test above would show nothing."""
    (whole, *_), (cut, *_) = (pool(DP).run(train, group, 1, Reduction(), torch.float32)[0] for group in (None, 2))
    assert not all(torch.equal(cut[name], whole[name]) for name in whole)


@contextmanager
def broken(mutant: str) -> Iterator[None]:
    def count_all(self: DistributedOptimizer, *args: object, **kwargs: object) -> None:
        built(self, *args, **kwargs)  # type: ignore[arg-type]
        self._counted = [bucket.grad_shard for bucket in self._buckets]

    built = DistributedOptimizer.__init__
    mutants = {
        "sums are not joined": patch.object(Bucket, "begin_join", lambda bucket: None),
        "every copy counts": patch.object(DistributedOptimizer, "__init__", count_all),
    }
    with mutants[mutant]:
        yield


def train_broken(mutant: str, level: int) -> tuple[Shares, Shares, float]:
    with broken(mutant):
        return train(2, level, Reduction(), max_norm=1.0)


@pytest.mark.parametrize("mutant", ["sums are not joined", "every copy counts"])
@pytest.mark.parametrize("level", [1, 3])
def test_a_wrong_sum_or_norm_would_show(pool: Pools, level: int, mutant: str) -> None:
    right, _, norm = pool(DP).run(train, 2, level, Reduction(), torch.float64, 1.0)[0]
    wrong, _, wrong_norm = pool(DP).run(train_broken, mutant, level)[0]
    assert abs(wrong_norm / norm - 1) > 0.1
    assert apart(wrong, right) > 1e-3


def joins_of_a_step(level: int, overlap: bool) -> list[str]:
    """What is begun in a step, in order; ``end`` is where backward has ended."""
    infos, optimizer, _ = make(2, level, Reduction(overlap=overlap), torch.float64)
    events: list[str] = []

    def told(word: str, real: Callable[[Bucket], None]) -> Callable[[Bucket], None]:
        def method(self: Bucket) -> None:
            if word == "reduce" or self._joining is None:
                events.append(f"{word} {self.layout.slots[0].info.name}")
            real(self)

        return method

    with (
        patch.object(Bucket, "begin_reduce", told("reduce", Bucket.begin_reduce)),
        patch.object(Bucket, "begin_join", told("join", Bucket.begin_join)),
    ):
        optimizer.begin_step(1)
        for name in [info.name for info in reversed(infos)]:
            give_gradients(infos, 0, skip=[info.name for info in infos if info.name != name])
        events.append("end")
        optimizer.reduce_gradients()
    return events


@pytest.mark.parametrize("level", [1, 3])
def test_sums_are_joined_within_backward_one_bucket_behind(pool: Pools, level: int) -> None:
    events = pool(DP).run(joins_of_a_step, level, True)[0]
    during, matrices = events[: events.index("end")], ("matrix", "wide", "square")
    assert during.index("reduce square") < during.index("join square") < during.index("join wide")
    assert during.index("join square") <= during.index("reduce wide"), "the next matrix's reduction waits for nothing"
    found = [event for event in events if event.split()[-1] in matrices]
    assert sorted(found) == sorted(f"{word} {name}" for word in ("join", "reduce") for name in matrices)
    late = pool(DP).run(joins_of_a_step, 1, False)[0]
    assert late[0] == "end", "without overlap all happens after backward"


def one_too_many() -> str:
    infos, optimizer, _ = make(2, 2, Reduction(), torch.float64)
    optimizer.begin_step(1)
    give_gradients(infos, 0)
    try:
        give_gradients(infos, 1)
    except AssertionError as error:
        return str(error)
    return "nobody noticed"


def test_a_gradient_after_the_sums_are_joined_is_our_mistake(pool: Pools) -> None:
    assert all("a sum that is being joined" in told for told in pool(DP).run(one_too_many))
