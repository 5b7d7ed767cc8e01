"""Gradients and weights that a rank keeps only its shard of: the same updates, and memory that is not there."""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.optim.buckets import Bucket, Reduction, Sharding
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.gathering import MOST_WHOLE, Gathering
from megatron_aquila.optim.rules import Sgd
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.parallel.weight_reads import WeightReads
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.optim.toys import SHAPES, draw, give_gradients, toy_infos, weights_of, whole

Pools = Callable[[int], WorkerPool]
LEVELS = {1: Sharding(), 2: Sharding(gradients=True), 3: Sharding(gradients=True, weights=True)}
NAMES = list(SHAPES)
MICROBATCHES = 3


def make(
    dp: int, level: int, *, overlap: bool = True, bucket_bytes: int = 1, infos: list[ParamInfo] | None = None
) -> tuple[list[ParamInfo], DistributedOptimizer]:
    """An optimizer whose every matrix has a bucket of its own; its weights are taken for the masters."""
    ctx = ParallelContext.create(RankGrid(dp=dp), torch.device("cpu"))
    infos = toy_infos(torch.float64) if infos is None else infos
    optimizer = DistributedOptimizer(
        infos,
        ctx,
        rule=Sgd(),
        bucket_bytes=bucket_bytes,
        reduction=Reduction(overlap=overlap),
        sharding=LEVELS[level],
    )
    optimizer.refresh_masters()
    return infos, optimizer


def train(dp: int, level: int, overlap: bool, skip: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters after two steps, and this rank's shares of the last gradients. The last microbatch skips ``skip``."""
    infos, optimizer = make(dp, level, overlap=overlap)
    for step in range(2):
        optimizer.begin_step(MICROBATCHES)
        for microbatch in range(MICROBATCHES):
            optimizer.wait_for_weights([info.param for info in infos])
            give_gradients(infos, step, microbatch, dp, skip=skip if microbatch == MICROBATCHES - 1 else ())
        optimizer.reduce_gradients()
        optimizer.step(0.1, optimizer.clip(1.0))
    shares = {f"{o.info.name}@{o.start}": v.clone() for kind, o, v in optimizer.ranges() if kind == "grad"}
    return weights_of(infos, optimizer), shares


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    off = [float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours]
    return max(off, default=0.0)  # a rank's share may be padding alone


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_updates_are_those_of_zero_1(pool: Pools, dp: int, level: int, overlap: bool) -> None:
    for skip in ((), ("matrix", "square")):  # what is left at the end of a step counts, too
        expected, found = (pool(dp).run(train, dp, n, overlap, skip) for n in (1, level))
        for ours, theirs in zip(found, expected, strict=True):
            assert max(apart(mine, their) for mine, their in zip(ours, theirs, strict=True)) <= 1e-14


def test_a_round_that_is_not_brought_in_shows() -> None:
    _, right = train(1, 2, overlap=True)
    with patch.object(Bucket, "bring_in", lambda bucket: setattr(bucket, "_reducing", None)):
        _, wrong = train(1, 2, overlap=True)
    assert apart(wrong, right) > 0.1


def test_pieces_that_are_added_ahead_of_their_backward_count_once() -> None:
    """As a head's, which adds to its sum in forward; two forwards come before the first backward."""
    infos, optimizer = make(1, 2)
    param = infos[NAMES.index("square")].param
    main = optimizer.main_grads()[param]
    optimizer.begin_step(2)
    pieces = [draw(SHAPES["square"], 5, microbatch) for microbatch in range(2)]
    for piece in pieces:
        main.total.add_(piece)
    for _ in pieces:
        main.added()
    optimizer.reduce_gradients()
    (found,) = [v for kind, o, v in optimizer.ranges() if kind == "grad" and o.info.name == "square"]
    assert torch.equal(found.view(SHAPES["square"]), pieces[0] + pieces[1])


def bytes_of(flat: Tensor) -> int:
    return flat.untyped_storage().nbytes()


def test_gradients_have_memory_only_while_they_wait() -> None:
    infos, optimizer = make(1, 2)
    matrices = [bucket for bucket in optimizer._buckets if bucket.layout.weight_decay]
    vectors = [bucket for bucket in optimizer._buckets if not bucket.layout.weight_decay]
    optimizer.begin_step(2)
    for microbatch in range(2):
        for name in NAMES[::-1]:
            give_gradients(infos, 0, microbatch, skip=[other for other in NAMES if other != name])
            alive = [bucket for bucket in matrices if bytes_of(bucket.grads)]
            assert len(alive) == 1, "one whose reduction was begun last, and none beside it"
    optimizer.reduce_gradients()
    assert not any(bytes_of(bucket.grads) for bucket in matrices)
    assert all(bytes_of(bucket.grads) for bucket in vectors), "what is small is left as it is"


def many(count: int) -> list[ParamInfo]:
    return [whole(f"w{i}", draw((8, 8), i), weight_decay=True) for i in range(count)]


def test_weights_have_memory_where_they_are_read_and_next_to_that() -> None:
    infos, optimizer = make(1, 3, infos=many(8))
    buckets = [optimizer._bucket_of[info.param] for info in infos]
    assert not any(bytes_of(bucket.weights) for bucket in buckets), "after the masters were taken"
    for place in (*range(8), *range(7, -1, -1)):
        optimizer.wait_for_weights([infos[place].param])
        assert torch.equal(infos[place].param, draw((8, 8), place))
        there = [bool(bytes_of(bucket.weights)) for bucket in buckets]
        assert there[place]
        assert sum(there) <= MOST_WHOLE
    optimizer.begin_step(1)
    give_gradients(infos, 0)
    optimizer.reduce_gradients()
    optimizer.step(0.1, optimizer.clip(0.0))
    assert not any(bytes_of(bucket.weights) for bucket in buckets), "they are not this step's"


class Recorded:
    """A bucket that tells what is asked of it."""

    def __init__(self, name: int, events: list[tuple[str, int]]) -> None:
        self.name, self.events, self.is_whole = name, events, False

    def begin_gather(self) -> None:
        if not self.is_whole:
            self.events.append(("gather", self.name))
        self.is_whole = True

    def finish_publish(self) -> None:
        assert self.is_whole, f"{self.name} is awaited and was never gathered"

    def let_go(self) -> None:
        self.events.append(("let go", self.name))
        self.is_whole = False


def recorded(count: int, *, ahead: bool = True) -> tuple[Gathering, list[Recorded], list[tuple[str, int]]]:
    events: list[tuple[str, int]] = []
    buckets = [Recorded(name, events) for name in range(count)]
    gathering = Gathering(buckets, ahead=ahead)  # type: ignore[arg-type]
    return gathering, buckets, events


@settings(deadline=None)
@given(reads=st.lists(st.integers(0, 7), max_size=40), ahead=st.booleans())
def test_whatever_is_read_is_whole_and_few_others_are(reads: list[int], ahead: bool) -> None:
    gathering, buckets, _ = recorded(8, ahead=ahead)
    for place in reads:
        gathering.read(buckets[place])  # type: ignore[arg-type]
        assert buckets[place].is_whole
        assert sum(bucket.is_whole for bucket in buckets) <= MOST_WHOLE


def test_a_pass_there_and_back_gathers_each_once_a_way_and_ahead() -> None:
    gathering, buckets, events = recorded(6)
    for place in range(6):
        gathering.read(buckets[place])  # type: ignore[arg-type]
        if place < 5:
            assert ("gather", place + 1) in events, "the next was not begun ahead"
    assert [name for word, name in events if word == "gather"] == [0, 1, 2, 3, 4, 5]
    events.clear()
    for place in range(5, -1, -1):
        gathering.read(buckets[place])  # type: ignore[arg-type]
    assert [name for word, name in events if word == "gather"] == [2, 1, 0], "the last ones were still there"


def test_reads_are_told_to_whoever_listens() -> None:
    reads, told = WeightReads(), []
    weight = torch.nn.Parameter(torch.zeros(1))
    reads.announce(weight)
    reads.announce_to(told.append)
    reads.announce(weight)
    assert told == [weight]
