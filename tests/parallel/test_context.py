from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.parallel import context
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.dry import fake_world


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


@contextmanager
def splittable() -> Iterator[list[tuple[str, list[list[int]]]]]:
    """A world that can be split, as NCCL's can; lists the name and the parts of each split."""
    calls, new_group = [], dist.new_group

    def split(parent: object, parts: list[list[int]], *, timeout: object, group_desc: str) -> object:
        assert parent is dist.group.WORLD
        calls.append((group_desc, parts))
        (mine,) = (part for part in parts if dist.get_rank() in part)
        return new_group(mine, timeout=timeout)

    with (
        mock.patch.object(context, "_is_splittable", return_value=True),
        mock.patch.object(dist, "split_group", split),
        mock.patch.object(dist, "new_group", side_effect=AssertionError("made one by one")),
    ):
        yield calls


GRID_34B = RankGrid(tp=4, pp=4, dp=32)
SPLITS = [
    (GRID_34B, False, 6, 656),
    (GRID_34B, True, 10, 1168),
    (RankGrid(tp=4, pp=4, dp=32, zero_group=8), False, 8, 656 + 64 + 128),
    (RankGrid(tp=2, cp=2, dp=2, pp=2), False, 6, 8 * 5 + 4),
    (RankGrid(tp=2, cp=2, dp=4, pp=4, zero_group=4), True, 14, 32 * 2 + 16 * 9 + 8 + 16 + 32),
    (RankGrid(tp=8), False, 0, 0),
]


@pytest.mark.parametrize(("grid", "turns_back", "splits", "groups"), SPLITS, ids=str)
def test_a_world_that_can_be_split_is_split_once_a_partition(grid, turns_back, splits, groups) -> None:
    """Instead of once a group; in the same order on every rank, which finds itself in the group that the grid says."""
    orders = []
    for rank in range(0, grid.world_size, max(1, grid.world_size // 7)):
        with fake_world(rank, grid.world_size), splittable() as calls:
            ctx = ParallelContext.create(grid, torch.device("cpu"), pp_turns_back=turns_back)
            wanted = {
                **{axis: grid.groups(axis) for axis in ("tp", "cp", "dp", "pp")},
                "dp_cp": grid.groups("dp", "cp"),
                "shards": grid.shard_groups(),
                "copies": grid.copy_groups(),
            }
            found = {name: [getattr(ctx, name)] for name in wanted} | {"pp": [ctx.pp, *ctx.pp_links.values()]}
            for name, partition in wanted.items():
                (mine,) = (ranks for ranks in partition if rank in ranks)
                for group in found[name]:
                    assert (group.ranks, group.rank, group.size) == (mine, mine.index(rank), len(mine))
                    assert len(mine) == 1 or tuple(dist.get_process_group_ranks(group.handle)) == mine
        orders.append(calls)
    assert all(calls == orders[0] for calls in orders)
    assert all(sorted(chain(*parts)) == [*range(grid.world_size)] for _, parts in orders[0])
    assert (len(orders[0]), sum(len(parts) for _, parts in orders[0])) == (splits, groups)
    with fake_world(1, grid.world_size), mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        ParallelContext.create(grid, torch.device("cpu"), pp_turns_back=turns_back)
    assert new_group.call_count == groups  # what one by one comes to


def test_splits_have_the_names_that_errors_and_traces_use() -> None:
    with fake_world(0, 8), splittable() as calls:
        ParallelContext.create(RankGrid(tp=2, pp=2, dp=2), torch.device("cpu"))
    assert [name for name, _ in calls] == ["tp", "dp", "pp", "pp_link B False 0"]


@pytest.mark.parametrize(("made", "where"), [(SimpleNamespace(ranks=(0, 1)), r"\(0, 1\)"), (None, "no group")], ids=str)
def test_a_split_that_puts_a_rank_elsewhere_is_noticed(made: SimpleNamespace | None, where: str) -> None:
    with (
        fake_world(3, 4),
        splittable(),
        mock.patch.object(dist, "split_group", return_value=made),
        mock.patch.object(dist, "get_process_group_ranks", lambda made: made.ranks),
        pytest.raises(AssertionError, match=rf"tp: rank 3 is to be in \(2, 3\), torch put it into {where}"),
    ):
        ParallelContext.create(RankGrid(tp=2, dp=2), torch.device("cpu"))


def test_only_a_world_of_nccl_on_one_device_can_be_split() -> None:
    def world(*, bound: bool = True, supports: bool = True) -> SimpleNamespace:
        found = SimpleNamespace(supports_splitting=supports)
        return SimpleNamespace(
            bound_device_id=torch.device("cuda", 0) if bound else None, _get_backend=lambda _device: found
        )

    with mock.patch.object(dist, "get_backend", return_value="nccl"):
        assert context._is_splittable(world())
        assert not context._is_splittable(world(bound=False))
        assert not context._is_splittable(world(supports=False))  # as with TORCH_DISTRIBUTED_DEBUG=DETAIL
    for other in ("gloo", "cpu:gloo,cuda:nccl"):
        with mock.patch.object(dist, "get_backend", return_value=other):
            assert not context._is_splittable(world())
