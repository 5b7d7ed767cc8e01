from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.trail import Silent
from megatron_aquila.pipeline.action import Op
from megatron_aquila.pipeline.wire import LocalWire, P2PWire
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool

SHAPE = (2, 3)


def make_wire(
    pp: int, stage_rank: Sequence[int] | None = None, *, depth: int = 1, overlap: bool = True
) -> tuple[ParallelContext, P2PWire]:
    ctx = ParallelContext.create(RankGrid(pp=pp), torch.device("cpu"), pp_turns_back=stage_rank is not None)
    placed = range(pp) if stage_rank is None else stage_rank
    return ctx, P2PWire(
        ctx, stage_rank=placed, activation_shape=SHAPE, dtype=torch.float64, depth=depth, overlap=overlap
    )


def both_ways(count: int) -> list[float]:
    """Every rank sends a message each way before it receives one from each side, ``count`` times."""
    ctx, wire = make_wire(4)
    stage = ctx.pp.rank
    got = []
    for m in range(count):
        if stage < 3:
            wire.send(Op.F, stage + 1, m, torch.full(SHAPE, 100.0 * stage + m, dtype=torch.float64))
        if stage > 0:
            wire.send(Op.B, stage - 1, m, torch.full(SHAPE[::-1], -100.0 * stage - m, dtype=torch.float64).T)
        for op, has_source in ((Op.B, stage < 3), (Op.F, stage > 0)):
            got += [wire.recv(op, stage, m).unique().item()] if has_source else []
    wire.flush()
    assert not any(wire._sending.values())
    return got


def test_messages_arrive_in_order_each_direction_for_itself(pool: Callable[[int], WorkerPool]) -> None:
    for stage, got in enumerate(pool(4).run(both_ways, 3)):
        expected = []
        for m in range(3):
            expected += [-100.0 * (stage + 1) - m] if stage < 3 else []
            expected += [100.0 * (stage - 1) + m] if stage > 0 else []
        assert got == expected


class Kept(Silent):
    """Keeps which message between which ranks was begun."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, tuple[int, int] | None]] = []

    def begin(self, op: str, x: Any, *, link: tuple[int, int] | None, waits: bool) -> int:
        self.begun.append((op, link))
        return len(self.begun)


def crumbs_and_messages() -> tuple[list[tuple[str, tuple[int, int] | None]], list[str]]:
    trail, asked = Kept(), []
    ctx = ParallelContext.create(RankGrid(pp=2), torch.device("cpu"), trail=trail)
    wire = P2PWire(ctx, stage_rank=(0, 1), activation_shape=SHAPE, dtype=torch.float64)
    isend, irecv, x = dist.isend, dist.irecv, torch.zeros(SHAPE, dtype=torch.float64)
    with (
        mock.patch.object(dist, "isend", lambda *args, **words: (asked.append("send"), isend(*args, **words))[1]),
        mock.patch.object(dist, "irecv", lambda *args, **words: (asked.append("recv"), irecv(*args, **words))[1]),
    ):
        for m in range(2):
            if ctx.pp.rank == 0:
                wire.send(Op.F, 1, m, x)
                wire.recv(Op.B, 0, m)
            else:
                wire.expect(Op.F, 1, m)
                wire.recv(Op.F, 1, m)
                wire.send(Op.B, 0, m, x)
        wire.flush()
    return trail.begun, asked


def test_every_message_leaves_a_crumb_with_both_ends(pool: Callable[[int], WorkerPool]) -> None:
    first, second = pool(2).run(crumbs_and_messages)
    assert first == ([("send", (0, 1)), ("recv", (1, 0))] * 2, ["send", "recv"] * 2)
    assert second == ([("recv", (0, 1)), ("send", (1, 0))] * 2, ["recv", "send"] * 2)


Used = list[tuple[str, int, object]]


def groups_used(stage_rank: Sequence[int]) -> Used:
    """The way, the peer and the group of every message of one microbatch, forward and backward, on this rank."""
    ctx, wire = make_wire(max(stage_rank) + 1, stage_rank)
    x, last = torch.zeros(SHAPE, dtype=torch.float64), len(stage_rank) - 1
    links = {id(link.handle): str(kind) for kind, link in ctx.pp_links.items()}
    with (
        mock.patch.object(dist, "isend", wraps=dist.isend) as isend,
        mock.patch.object(dist, "irecv", wraps=dist.irecv) as irecv,
    ):
        for op, stages, onward in ((Op.F, range(last + 1), 1), (Op.B, range(last, -1, -1), -1)):
            for stage in stages:
                if stage_rank[stage] == ctx.pp.rank:
                    if stage != stages[0]:
                        wire.recv(op, stage, 0)
                    if stage != stages[-1]:
                        wire.send(op, stage + onward, 0, x)
        wire.flush()
    calls = [("to", call) for call in isend.call_args_list] + [("from", call) for call in irecv.call_args_list]
    return [(way, call.args[1], links[id(call.kwargs["group"])]) for way, call in calls]


@pytest.mark.parametrize(
    "stage_rank", [(0, 1), (0, 1, 0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 3) * 2, (0, 1, 2, 3, 3, 2, 1, 0)]
)
def test_in_a_group_a_rank_only_sends_to_one_other_or_only_receives(
    pool: Callable[[int], WorkerPool], stage_rank: tuple[int, ...]
) -> None:
    """In one NCCL communicator a rank's messages wait for each other: those of two links could wait in a circle."""
    found = pool(max(stage_rank) + 1).run(groups_used, stage_rank)
    for used in found:
        roles: dict[object, set[tuple[str, int]]] = {}
        for way, peer, link in used:
            roles.setdefault(link, set()).add((way, peer))
        assert all(len(role) == 1 for role in roles.values())
    between_ranks = sum(a != b for a, b in pairwise(stage_rank))
    assert sum(len(used) for used in found) == 2 * 2 * between_ranks  # on both ends, forward and backward


def posted_ahead(overlap: bool) -> tuple[int, list[float]]:
    """Receives posted when two were expected, and what came."""
    ctx, wire = make_wire(2, overlap=overlap)
    if ctx.rank == 0:
        for m in range(2):
            wire.send(Op.F, 1, m, torch.full(SHAPE, 1.0 + m, dtype=torch.float64))
        wire.flush()
        return 0, []
    with mock.patch.object(dist, "irecv", wraps=dist.irecv) as irecv:
        wire.expect(Op.F, 1, 0)
        wire.expect(Op.F, 1, 1)
        posted = irecv.call_count
        return posted, [wire.recv(Op.F, 1, m).unique().item() for m in range(2)]


@pytest.mark.parametrize("overlap", [True, False])
def test_receives_are_posted_when_they_are_expected(pool: Callable[[int], WorkerPool], overlap: bool) -> None:
    assert pool(2).run(posted_ahead, overlap)[1] == (2 if overlap else 0, [1.0, 2.0])


def expected_in_vain() -> str:
    """What flush says of a message that was expected and not received."""
    ctx, wire = make_wire(2)
    if ctx.rank == 0:
        wire.send(Op.F, 1, 0, torch.zeros(SHAPE, dtype=torch.float64))
        wire.flush()
        return ""
    wire.expect(Op.F, 1, 0)
    with pytest.raises(AssertionError) as error:
        wire.flush()
    wire.recv(Op.F, 1, 0)
    return str(error.value)


def test_what_was_expected_must_be_received(pool: Callable[[int], WorkerPool]) -> None:
    assert pool(2).run(expected_in_vain)[1].startswith("expected and never received: ['1F0']")


def test_stages_of_one_rank_hand_over() -> None:
    _, wire = make_wire(1, (0, 0))
    x = torch.zeros(SHAPE, dtype=torch.float64)
    wire.send(Op.F, 1, 3, x)
    wire.expect(Op.F, 1, 3)
    with pytest.raises(AssertionError, match=r"sent and never received: \['1F3'\]"):
        wire.flush()
    assert wire.recv(Op.F, 1, 3) is x
    wire.flush()


def sends_before_a_wait(depth: int) -> int:
    """How many sends go out before one waits."""
    ctx, wire = make_wire(2, depth=depth)
    work = mock.Mock()
    with mock.patch.object(dist, "isend", return_value=work):
        for sent in range(9):
            wire.send((Op.F, Op.B)[ctx.rank], 1 - ctx.rank, sent, torch.zeros(SHAPE, dtype=torch.float64))
            if work.wait.called:
                return sent
    return -1


def test_a_link_holds_as_many_messages_as_told(pool: Callable[[int], WorkerPool]) -> None:
    assert [pool(2).run(sends_before_a_wait, depth) for depth in (1, 3)] == [[1, 1], [3, 3]]


def failed_send() -> str:
    """What the second send says when the first one failed."""
    ctx, wire = make_wire(2)
    x = torch.zeros(SHAPE, dtype=torch.float64)
    broken = mock.Mock()
    broken.wait.side_effect = RuntimeError("connection reset")
    with mock.patch.object(dist, "isend", return_value=broken):
        op = (Op.F, Op.B)[ctx.rank]
        wire.send(op, 1 - ctx.rank, 0, x)
        with pytest.raises(RuntimeError) as error:
            wire.send(op, 1 - ctx.rank, 1, x)
    return str(error.value)


def test_a_failed_send_is_not_dropped(pool: Callable[[int], WorkerPool]) -> None:
    for told in pool(2).run(failed_send):
        assert "aquila doctor hang" in told
        assert "(connection reset)" in told


def test_only_the_agreed_shape_and_type_travel() -> None:
    _, wire = make_wire(1, (0, 0))
    for wrong in (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(SHAPE)):
        with pytest.raises(AssertionError, match=r"F7 for stage 1 is .* every message is"):
            wire.send(Op.F, 1, 7, wrong)


def test_local_wire_hands_over_and_shows_what_nobody_took() -> None:
    wire, x, dx = LocalWire(), torch.zeros(1), torch.ones(1)
    wire.send(Op.F, 1, 0, x)
    wire.send(Op.B, 1, 0, dx)
    assert wire.recv(Op.F, 1, 0) is x
    with pytest.raises(AssertionError, match=r"sent and never received: \['1B0'\]"):
        wire.flush()
    assert wire.recv(Op.B, 1, 0) is dx
    wire.flush()
