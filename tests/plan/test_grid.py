from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.plan.grid import ORDER, RankGrid

degrees = st.integers(1, 4)
grids = st.builds(RankGrid, tp=degrees, cp=degrees, dp=degrees, pp=degrees)


@given(grids, st.data())
def test_rank_is_the_inverse_of_coords(grid, data):
    rank = data.draw(st.integers(0, grid.world_size - 1))
    assert grid.rank(**grid.coords(rank)) == rank


@given(grids, st.sets(st.sampled_from(ORDER)))
def test_groups_partition_the_world(grid, axes):
    groups = grid.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
    assert {len(group) for group in groups} == {grid.size(*axes)}
    assert all(list(group) == sorted(group) for group in groups)


@given(grids, st.data())
def test_a_shard_of_every_group_and_a_copy_of_every_shard(grid, data):
    replicas = grid.size("dp", "cp")
    size = data.draw(st.sampled_from([None, *(n for n in range(1, replicas + 1) if replicas % n == 0)]))
    cut = replace(grid, zero_group=size)
    assert cut.num_shards * cut.num_copies == replicas == cut.num_pieces(in_rank_order=True)
    assert cut.num_pieces(in_rank_order=False) == cut.num_shards == (replicas if size is None else size)
    everyone = list(range(grid.world_size))
    for groups, members in ((cut.shard_groups(), cut.num_shards), (cut.copy_groups(), cut.num_copies)):
        assert sorted(rank for group in groups for rank in group) == everyone
        assert {len(group) for group in groups} == {members}
    for rank in everyone:
        (shards,), (copies,), (all_replicas,) = (
            [group for group in groups if rank in group]
            for groups in (cut.shard_groups(), cut.copy_groups(), grid.groups("dp", "cp"))
        )
        assert set(shards) & set(copies) == {rank}
        # neighbours share out, and a rank's place among them is its copies' place
        first = all_replicas.index(shards[0])
        assert all_replicas[first : first + len(shards)] == shards
        assert {all_replicas.index(copy) % cut.num_shards for copy in copies} == {shards.index(rank)}


def test_tp_is_fastest_and_pp_slowest():
    grid = RankGrid(tp=2, dp=2, pp=2)
    assert grid.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_a_rank_outside_the_world_is_our_own_mistake():
    with pytest.raises(AssertionError, match="rank 8 is outside a world of 8"):
        RankGrid(tp=8).coords(8)
