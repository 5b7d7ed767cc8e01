from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.pipeline.action import Op
from megatron_aquila.pipeline.wire import LocalWire, P2PWire
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool

SHAPE = (2, 3)


def make_wire(pp: int) -> tuple[ParallelContext, P2PWire]:
    ctx = ParallelContext.create(RankGrid(pp=pp), torch.device("cpu"))
    return ctx, P2PWire(ctx, activation_shape=SHAPE, dtype=torch.float64)


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
    assert not wire._sending
    return got


def test_messages_arrive_in_order_each_direction_for_itself(pool: Callable[[int], WorkerPool]) -> None:
    for stage, got in enumerate(pool(4).run(both_ways, 3)):
        expected = []
        for m in range(3):
            expected += [-100.0 * (stage + 1) - m] if stage < 3 else []
            expected += [100.0 * (stage - 1) + m] if stage > 0 else []
        assert got == expected


def handles_used() -> bool:
    """Whether activations travel over ``ctx.pp`` and gradients over ``ctx.pp_backward``, on both ends."""
    ctx, wire = make_wire(2)
    x = torch.zeros(SHAPE, dtype=torch.float64)
    with (
        mock.patch.object(dist, "isend", wraps=dist.isend) as isend,
        mock.patch.object(dist, "irecv", wraps=dist.irecv) as irecv,
    ):
        if ctx.rank == 0:
            wire.send(Op.F, 1, 0, x)
            wire.recv(Op.B, 0, 0)
        else:
            wire.recv(Op.F, 1, 0)
            wire.send(Op.B, 0, 0, x)
        wire.flush()
    forward, backward = (isend, irecv) if ctx.rank == 0 else (irecv, isend)
    over = [call.kwargs["group"] for end in (forward, backward) for call in end.call_args_list]
    return over == [ctx.pp.handle, ctx.pp_backward.handle] and over[0] is not over[1]


def test_each_direction_has_a_communicator_of_its_own(pool: Callable[[int], WorkerPool]) -> None:
    """Over one, an NCCL rank that sends an activation and its neighbour that sends a gradient would both wait."""
    assert pool(2).run(handles_used) == [True, True]


def failed_send() -> str:
    """What the second send says when the first one failed."""
    ctx, wire = make_wire(2)
    x = torch.zeros(SHAPE, dtype=torch.float64)
    broken = mock.Mock()
    broken.wait.side_effect = RuntimeError("connection reset")
    with mock.patch.object(dist, "isend", return_value=broken):
        wire.send(Op.F, 1 - ctx.rank, 0, x)
        with pytest.raises(RuntimeError) as error:
            wire.send(Op.F, 1 - ctx.rank, 1, x)
    return str(error.value)


def test_a_failed_send_is_not_dropped(pool: Callable[[int], WorkerPool]) -> None:
    assert pool(2).run(failed_send) == ["connection reset"] * 2


def test_only_the_agreed_shape_and_type_travel() -> None:
    wire = P2PWire(ParallelContext.single(), activation_shape=SHAPE, dtype=torch.float64)
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
