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


def test_tp_is_fastest_and_pp_slowest():
    grid = RankGrid(tp=2, dp=2, pp=2)
    assert grid.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_a_rank_outside_the_world_is_our_own_mistake():
    with pytest.raises(AssertionError, match="rank 8 is outside a world of 8"):
        RankGrid(tp=8).coords(8)
