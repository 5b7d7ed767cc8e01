from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.plan.grid import RankGrid


def test_a_world_of_one_has_groups_of_one_and_no_process_group() -> None:
    ctx = ParallelContext.single()
    assert ctx.device == torch.device("cpu")
    for name in ("tp", "cp", "dp", "pp", "dp_cp", "world"):
        assert getattr(ctx, name) == Group(name, 0, 1, (0,), None)
    assert ctx.host_world is ctx.world
    assert ctx.pp_links == {}


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


def communicators(grid: RankGrid) -> tuple[list[list[int]], list[set[str]]]:
    """The groups that were made, in order, and which of the context's share each communicator."""
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        ctx = ParallelContext.create(grid, torch.device("cpu"))
    shared: dict[object, set[str]] = {}
    named = {name: getattr(ctx, name) for name in ("tp", "cp", "dp", "pp", "dp_cp", "copies", "world")}
    if ctx.shards is not ctx.dp_cp:
        named["shards"] = ctx.shards
    links = {f"{op} {'up' if up else 'down'} {odd}": link for (op, up, odd), link in ctx.pp_links.items()}
    for name, group in {**named, **links}.items():
        if group.size > 1:
            assert tuple(dist.get_process_group_ranks(group.handle)) == group.ranks
            shared.setdefault(group.handle, set()).add(name)
    assert shared[dist.group.WORLD] >= {"world"}
    return [call.args[0] for call in new_group.call_args_list], list(shared.values())


@pytest.mark.parametrize(
    ("grid", "made", "shared"),
    [
        (RankGrid(dp=4), [[0, 1, 2, 3]], [{"dp", "world"}, {"dp_cp"}]),
        (RankGrid(tp=4), [], [{"tp", "world"}]),
        (RankGrid(pp=4), [[0, 1, 2, 3]] * 3, [{"pp", "world", "F up 0"}, {"B down 0"}, {"F up 1"}, {"B down 1"}]),
        (RankGrid(tp=2, dp=2), [[0, 1], [2, 3], [0, 2], [1, 3]], [{"tp"}, {"dp", "dp_cp"}, {"world"}]),
        (
            RankGrid(tp=2, pp=2),
            [[0, 1], [2, 3], [0, 2], [1, 3], [0, 2], [1, 3]],
            [{"tp"}, {"pp", "F up 0"}, {"world"}, {"B down 0"}],
        ),
        (
            RankGrid(cp=2, dp=2),
            [[0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3]],
            [{"cp"}, {"dp"}, {"dp_cp"}, {"world"}],
        ),
        (
            RankGrid(tp=2, cp=2),
            [[0, 1], [2, 3], [0, 2], [1, 3], [0, 2], [1, 3]],
            [{"tp"}, {"cp"}, {"dp_cp"}, {"world"}],
        ),
        (
            RankGrid(dp=4, zero_group=2),
            [[0, 1, 2, 3], [0, 1], [2, 3], [0, 2], [1, 3]],
            [{"dp", "world"}, {"dp_cp"}, {"copies"}, {"shards"}],
        ),
        (
            RankGrid(cp=2, dp=2, zero_group=2),
            [[0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3], [0, 1], [2, 3], [0, 2], [1, 3]],
            [{"cp"}, {"dp"}, {"dp_cp"}, {"copies"}, {"world"}, {"shards"}],
        ),
        (RankGrid(dp=4, zero_group=1), [[0, 1, 2, 3]] * 2, [{"dp", "world"}, {"dp_cp"}, {"copies"}]),
    ],
    ids=str,
)
def test_no_communicator_is_made_twice(pool, grid: RankGrid, made: list[list[int]], shared: list[set[str]]) -> None:
    """Links but the first, a ring, shards and their copies have one of their own.

    Every rank makes the same ones in the same order.
    """
    assert pool(4).run(communicators, grid) == [(made, shared)] * 4


def test_a_link_that_was_not_made_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="F from pipeline rank 1 to 0: no such link was made"):
        ParallelContext.single().pp_link("F", 1, 0)


def test_a_grid_of_another_world_is_refused() -> None:
    with pytest.raises(AssertionError, match="needs 4 processes, there are 1"):
        groups(2)


def agreed_beside_nccl() -> tuple[bool, bool, str, float]:
    """What the host's world is where the world's backend carries no tensors of the host."""
    plain = ParallelContext.create(RankGrid(dp=2), torch.device("cpu"))
    with mock.patch.object(dist, "get_backend", return_value="nccl"):
        ctx = ParallelContext.create(RankGrid(dp=2), torch.device("cpu"))
    host, total = ctx.host_world, torch.tensor(ctx.rank + 1.0)
    dist.all_reduce(total, group=host.handle)
    own = host.handle is not ctx.world.handle and host.ranks == ctx.world.ranks
    return plain.host_world is plain.world, own, dist.get_backend(host.handle), total.item()


def test_hosts_agree_over_a_backend_of_their_own_where_the_world_has_none_for_them(pool) -> None:
    assert pool(2).run(agreed_beside_nccl) == [(True, True, "gloo", 3.0)] * 2
