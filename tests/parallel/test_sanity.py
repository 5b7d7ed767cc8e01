import pytest
import torch
from torch import nn

from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import Constant, Normal, ParamInfo, column_part, replicated_part, vocab_part
from megatron_aquila.parallel.sanity import ReplicaError, check_replicated
from megatron_aquila.plan.grid import RankGrid
from tests.parallel.worlds import CPU


def check(spoil: str | None, rank: int) -> str | None:
    """The message of ``check_replicated`` in a world of tp 2, dp 2 where one rank has one wrong parameter."""
    ctx = ParallelContext.create(RankGrid(tp=2, dp=2), CPU)
    norm = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight = nn.Parameter(torch.full((6, 4), float(ctx.tp.rank)))
    table = nn.Parameter(torch.full((8, 4), float(ctx.rank)))  # tp rank 1 holds only padding, which may differ
    if ctx.tp.rank == 0:
        table.data.zero_()
    infos = [
        ParamInfo(
            param=norm, stage=0, weight_decay=False, init=Constant(1.0), parts=(replicated_part("norm", (4,), ctx.tp),)
        ),
        ParamInfo(
            param=weight,
            stage=0,
            weight_decay=True,
            init=Normal(1.0),
            parts=(column_part("gate", (6, 4), ctx.tp), column_part("up", (6, 4), ctx.tp, local_row=3)),
        ),
        ParamInfo(
            param=table,
            stage=0,
            weight_decay=True,
            init=Normal(1.0),
            parts=(vocab_part("embed", (7, 4), 16, ctx.tp),),
        ),
    ]
    if ctx.rank == rank and spoil is not None:
        {"norm": norm, "up": weight[3:], "embed": table}[spoil].data.view(-1)[0] += 1 / 64
    try:
        check_replicated(infos, ctx)
    except ReplicaError as error:
        return str(error)
    return None


def test_equal_replicas_pass(pool) -> None:
    assert pool(4).run(check, None, 0) == [None] * 4


@pytest.mark.parametrize(
    ("spoil", "rank", "line"),
    [
        ("norm", 3, "norm at (0,): ranks [0, 1, 2] differ from ranks [3]"),  # drifted over tp
        ("up", 3, "up at (3, 0): ranks [1] differ from ranks [3]"),  # drifted over dp
        ("embed", 0, "embed at (0, 0): ranks [0] differ from ranks [2]"),
    ],
)
def test_a_drifted_replica_is_named_on_every_rank(pool, spoil: str, rank: int, line: str) -> None:
    assert pool(4).run(check, spoil, rank) == [f"replicas have drifted apart:\n{line}"] * 4


def test_padded_rows_may_differ(pool) -> None:
    assert pool(4).run(check, "embed", 3) == [None] * 4
