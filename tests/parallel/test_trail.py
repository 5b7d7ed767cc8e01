"""Every transfer is noted when it begins, when the host waits for it, and when it ends; a lost rank is explained."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import megatron_aquila
from megatron_aquila.errors import CommunicationError
from megatron_aquila.kernels.blocks import BLOCKS_REFERENCE
from megatron_aquila.parallel import collectives as c
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.trail import Silent, tracked
from megatron_aquila.parallel.ulysses import UlyssesAttention
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


def every_transfer() -> list[Any]:
    """What goes around a ring, and tokens for heads, after every collective."""
    trail = Kept()
    ctx = ParallelContext.create(RankGrid(cp=2), torch.device("cpu"), trail=trail)
    told = every_collective(True)
    for overlap in (False, True):
        c.begin_pass_on(torch.zeros(4), ctx.cp, overlap=overlap).wait()
    c.all_to_all(torch.zeros(4), ctx.cp)
    c.gather_objects({"a": 1}, ctx.cp)
    c.barrier(ctx.cp)
    return told + trail.told


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
    """A transfer that is added without ``tracked`` would be missing from every diagnosis."""
    assert pool(2).run(calls_and_crumbs) == [(13, 13)] * 2


def calls_and_crumbs() -> tuple[int, int]:
    """How often torch was asked for something, and how many crumbs that left. A turn of a ring sends and receives."""
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
        mock.patch.object(dist, "isend", counted(dist.isend)),
        mock.patch.object(c, "_all_gather_single", counted(c._all_gather_single)),
        mock.patch.object(c, "_reduce_scatter_single", counted(c._reduce_scatter_single)),
    ):
        told = every_transfer()
    return calls, sum(isinstance(one, tuple) for one in told)


TRANSFERS = re.compile(
    r"\bdist\.(i?send|i?recv|batch_isend_irecv|all_\w+|reduce\w*|broadcast\w*|gather\w*|scatter\w*|barrier)\b"
)
DOORS = {"parallel/collectives.py", "pipeline/wire.py"}  # whose every transfer is seen to leave a crumb, by their tests
POOL = "verify/pool.py"  # of a test's processes, no run's


def test_no_other_file_of_the_package_talks_to_torch_by_itself() -> None:
    package = Path(megatron_aquila.__file__).parent
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if TRANSFERS.search(path.read_text())}
    assert found - {POOL} == DOORS


def attention_crumbs(method: str) -> list[str]:
    """What ring or Ulysses attention leaves of a forward and a backward."""
    trail = Kept()
    ctx = ParallelContext.create(RankGrid(cp=2), torch.device("cpu"), trail=trail)
    q, k, v = (torch.randn(8, 1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    if method == "ring":
        o = RingAttention(cp=ctx.cp, kernel=BLOCKS_REFERENCE, overlap=True)(q, k, v)
    else:
        o = UlyssesAttention(cp=ctx.cp, attention=lambda q, k, v, documents: q + k + v)(q, k, v)
    o.sum().backward()
    return [one[0] for one in trail.told if isinstance(one, tuple)]


@pytest.mark.parametrize(("method", "crumbs"), [("ring", ["pass_on"] * 4), ("ulysses", ["all_to_all"] * 4)])
def test_attention_over_split_sequences_leaves_a_crumb_a_message(pool: Any, method: str, crumbs: list[str]) -> None:
    assert pool(2).run(attention_crumbs, method) == [crumbs] * 2


def test_a_turn_of_the_ring_waits_for_what_it_sends_and_for_what_comes() -> None:
    waited: list[str] = []
    works = [SimpleNamespace(wait=lambda name=name: waited.append(name)) for name in ("sent", "received")]
    c._All(works).wait()
    assert waited == ["sent", "received"]


def turned_as_on_nccl() -> list[float]:
    ctx = ParallelContext.create(RankGrid(cp=2), torch.device("cpu"))
    with (
        mock.patch.object(dist, "get_backend", return_value="nccl"),
        mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as together,
    ):
        came: list[float] = c.begin_pass_on(torch.full((2,), float(ctx.cp.rank)), ctx.cp, overlap=True).wait().tolist()
    assert together.call_count == 1, "one after the other, each would wait until its peer came to it"
    return came


def test_over_nccl_a_turn_is_one_launch(pool: Any) -> None:
    assert pool(2).run(turned_as_on_nccl) == [[1.0, 1.0], [0.0, 0.0]]


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
