"""Every transfer is noted when it begins, when the host waits for it, and when it ends; a lost rank is explained."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.errors import CommunicationError
from megatron_aquila.parallel import collectives as c
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.trail import Silent, tracked
from megatron_aquila.plan.grid import RankGrid


class Kept(Silent):
    """A trail that keeps what it is told, its groups' included."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, op: str, x: Any, *, link: tuple[int, int] | None, waits: bool) -> int:
        self.told.append((op, tuple(x.shape), waits))
        return len(self.told)

    def waits(self, ticket: int) -> None:
        self.told.append("waits")

    def ends(self, ticket: int) -> None:
        self.told.append("ends")


def every_collective(overlap: bool) -> list[Any]:
    trail = Kept()
    ctx = ParallelContext.create(RankGrid(tp=2), torch.device("cpu"), trail=trail)
    x, out = torch.zeros(4), torch.zeros(8)
    c.all_reduce_(x, ctx.tp)
    for pending in (
        c.begin_all_reduce_(x, ctx.tp, overlap=overlap),
        c.begin_all_gather(x, ctx.tp, overlap=overlap),
        c.begin_reduce_scatter(x, ctx.tp, overlap=overlap),
        c.begin_all_gather_flat_(out, x, ctx.tp, overlap=overlap),
        c.begin_reduce_scatter_flat_(x, out, ctx.tp, overlap=overlap),
        c.begin_reduce_scatter_flat_(x, out, ctx.tp, overlap=overlap, in_rank_order=True),
    ):
        pending.wait()
        pending.wait()  # again: no second crumb
    return trail.told


@pytest.mark.parametrize("overlap", [False, True])
def test_every_collective_leaves_one_crumb(pool: Any, overlap: bool) -> None:
    ops = [("all_reduce", 4), ("all_gather", 4), ("reduce_scatter", 4)]
    ops += [("all_gather", 4), ("reduce_scatter", 8), ("all_to_all", 8)]
    begun: list[Any] = [(op, (size,), not overlap) for op, size in ops]
    if overlap:  # all are launched in turn before the first is waited for
        expected = [*begun, *(["waits", "ends"] * len(ops))]
    else:
        expected = [told for one in begun for told in (one, "ends")]
    assert pool(2).run(every_collective, overlap) == [[("all_reduce", (4,), True), "ends", *expected]] * 2


def test_nothing_reaches_torch_past_the_trail(pool: Any) -> None:
    """A collective that is added without ``tracked`` would be missing from every diagnosis."""
    assert pool(2).run(calls_and_crumbs) == [(7, 7)] * 2


def calls_and_crumbs() -> tuple[int, int]:
    calls = 0

    def counted(right: Any) -> Any:
        def call(*args: Any, **words: Any) -> Any:
            nonlocal calls
            calls += 1
            return right(*args, **words)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counted(dist.all_reduce)),
        mock.patch.object(dist, "all_to_all_single", counted(dist.all_to_all_single)),
        mock.patch.object(c, "_all_gather_single", counted(c._all_gather_single)),
        mock.patch.object(c, "_reduce_scatter_single", counted(c._reduce_scatter_single)),
    ):
        told = every_collective(True)
    return calls, sum(isinstance(one, tuple) for one in told)


def failing(text: str) -> Any:
    def launch() -> None:
        raise RuntimeError(text)

    return launch


@pytest.mark.parametrize(
    "text", ["Connection closed by peer [127.0.0.1]:1", "Timed out waiting 5000ms\nstack", "ABORTED"]
)
def test_a_lost_rank_is_explained(text: str) -> None:
    with pytest.raises(CommunicationError, match="aquila doctor hang") as caught:
        tracked(Silent(), "all_reduce", torch.zeros(1), failing(text))
    assert str(caught.value).endswith(f"({text.splitlines()[0]})")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_our_own_mistakes_keep_their_words() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        tracked(Silent(), "all_reduce", torch.zeros(1), failing("shapes differ"))
