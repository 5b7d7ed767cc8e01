from collections.abc import Callable

import pytest
import torch

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
    """Every rank sends ``count`` messages each way before it receives any."""
    ctx, wire = make_wire(4)
    stage = ctx.pp.rank
    for m in range(count):
        if stage < 3:
            wire.send(Op.F, stage + 1, m, torch.full(SHAPE, 100.0 * stage + m, dtype=torch.float64))
        if stage > 0:
            wire.send(Op.B, stage - 1, m, torch.full(SHAPE[::-1], -100.0 * stage - m, dtype=torch.float64).T)
    got = []
    for op, has_source in ((Op.B, stage < 3), (Op.F, stage > 0)):
        got += [wire.recv(op, stage, m).unique().item() for m in range(count) if has_source]
    wire.flush()
    assert not wire._sending
    return got


def test_messages_arrive_in_order_each_direction_for_itself(pool: Callable[[int], WorkerPool]) -> None:
    for stage, got in enumerate(pool(4).run(both_ways, 3)):
        gradients = [-100.0 * (stage + 1) - m for m in range(3) if stage < 3]
        activations = [100.0 * (stage - 1) + m for m in range(3) if stage > 0]
        assert got == gradients + activations


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
