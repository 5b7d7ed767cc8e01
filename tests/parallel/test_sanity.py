import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_aquila.errors import ReplicaError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import Constant, Normal, ParamInfo, column_part, replicated_part, vocab_part
from megatron_aquila.parallel.sanity import BLOCK, apart, check_replicated, checksum
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
        ("norm", 3, "norm at (0,): rank 3 differs from ranks 0, 1, 2"),  # drifted over tp
        ("up", 3, "up at (3, 0): rank 1 and rank 3 differ, and neither is a majority"),  # drifted over dp
        ("embed", 0, "embed at (0, 0): rank 0 and rank 2 differ, and neither is a majority"),
    ],
)
def test_a_drifted_replica_is_named_on_every_rank(pool, spoil: str, rank: int, line: str) -> None:
    for told in pool(4).run(check, spoil, rank):
        assert told is not None
        head, found, way_out = told.split("\n")
        assert (head, found) == ("replicas have drifted apart:", line)
        assert "leave its machine out" in way_out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(data=st.data())
def test_every_flipped_bit_and_every_exchange_changes_the_checksum(dtype: torch.dtype, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 5, 1024, 3000]))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    right = checksum(x)
    assert right == checksum(x.clone())
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 8 * dtype.itemsize - 1))
    y = x.clone()
    mask = torch.tensor(-(2**bit) if bit == 8 * dtype.itemsize - 1 else 2**bit, dtype=bits)
    y.view(bits)[place] ^= mask
    assert checksum(y) != right
    other = data.draw(st.integers(0, size - 1))
    y = x.clone()
    y[[place, other]] = x[[other, place]]
    assert (checksum(y) != right) == (not torch.equal(x, y))


def test_blocks_count_in_their_order() -> None:
    x = torch.zeros(2 * BLOCK, dtype=torch.bfloat16)
    x[:BLOCK] = 1
    assert checksum(x) != checksum(x.flip(0))


def test_the_majority_names_the_odd_ones() -> None:
    def tables(*values: int) -> list[list[list[str | int]]]:
        return [[["w", 0, value]] for value in values]

    assert apart(tables(7, 7, 7)) == []
    assert apart(tables(7, 8, 7)) == ["w at (0,): rank 1 differs from ranks 0, 2"]
    assert apart(tables(7, 8, 7, 9, 7)) == ["w at (0,): ranks 1, 3 differ from ranks 0, 2, 4"]
    assert apart(tables(7, 8)) == ["w at (0,): rank 0 and rank 1 differ, and neither is a majority"]


def not_masters(names: list[str]) -> str | None:
    ctx = ParallelContext.create(RankGrid(dp=2), CPU)
    norm = nn.Parameter(torch.ones(4))
    part = replicated_part("norm", (4,), ctx.tp)
    info = ParamInfo(param=norm, stage=0, weight_decay=False, init=Constant(1.0), parts=(part,))
    try:
        check_replicated([info], ctx, not_masters=names if ctx.rank == 1 else [], alike_at=7)
    except ReplicaError as error:
        return str(error)
    return None


def test_a_rank_whose_weights_are_not_its_masters_is_named_on_all(pool) -> None:
    assert pool(2).run(not_masters, []) == [None] * 2
    line = "norm: the weights that rank 1 published are not its masters, rounded"
    for told in pool(2).run(not_masters, ["norm"]):
        assert told is not None
        assert told.startswith(f"replicas have drifted apart:\n{line}\nat step 7 they were still the same: resume from")


def test_padded_rows_may_differ(pool) -> None:
    assert pool(4).run(check, "embed", 3) == [None] * 4
