import pytest
import torch

from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.plan.grid import RankGrid


def test_a_world_of_one_has_groups_of_one_and_no_process_group() -> None:
    ctx = ParallelContext.single()
    assert ctx.device == torch.device("cpu")
    for name in ("tp", "cp", "dp", "pp", "pp_backward", "dp_cp", "world"):
        assert getattr(ctx, name) == Group(name, 0, 1, (0,), None)


def groups(dp: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    ctx = ParallelContext.create(RankGrid(tp=2, dp=dp), torch.device("cpu"))
    return {name: (getattr(ctx, name).rank, getattr(ctx, name).ranks) for name in ("tp", "dp", "dp_cp", "pp", "world")}


def test_groups_follow_the_grid(pool) -> None:
    assert pool(4).run(groups, 2)[3] == {
        "tp": (1, (2, 3)),
        "dp": (1, (1, 3)),
        "dp_cp": (1, (1, 3)),
        "pp": (0, (3,)),
        "world": (3, (0, 1, 2, 3)),
    }


def test_a_grid_of_another_world_is_refused() -> None:
    with pytest.raises(AssertionError, match="needs 4 processes, there are 1"):
        groups(2)
