from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.checkpoint.rectangles import Rectangle, cover_problem, flat_rectangles

rectangles = st.builds(lambda r, c, h, w: Rectangle((r, c), (h, w)), *[st.integers(0, 5)] * 2, *[st.integers(1, 4)] * 2)


def cells(rectangle: Rectangle) -> set[tuple[int, int]]:
    (row, column), (rows, columns) = rectangle.offset, rectangle.shape
    return {(r, c) for r in range(row, row + rows) for c in range(column, column + columns)}


@given(rectangles, rectangles)
def test_intersection_is_that_of_the_cells(a: Rectangle, b: Rectangle) -> None:
    common = a.intersection(b)
    assert (set() if common is None else cells(common)) == cells(a) & cells(b)
    if common is not None:
        values = torch.arange(100).view(10, 10)
        inside_a = values[a.within(Rectangle((0, 0), (10, 10)))][common.within(a)]
        assert torch.equal(inside_a, values[common.within(Rectangle((0, 0), (10, 10)))])


@given(st.lists(rectangles, max_size=6))
def test_cover_problem_is_that_of_the_cells(pieces: list[Rectangle]) -> None:
    shape = (6, 7)
    inside = all(cells(piece) <= cells(Rectangle((0, 0), shape)) for piece in pieces)
    apart = all(not cells(a) & cells(b) for a, b in combinations(pieces, 2))
    whole = sum(piece.numel for piece in pieces) == 42
    assert (cover_problem(shape, pieces) is None) == (inside and apart and whole)


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([Rectangle((0, 0), (2, 3))], None),
        ([Rectangle((1, 0), (1, 3)), Rectangle((0, 0), (1, 2)), Rectangle((0, 2), (1, 1))], None),
        ([Rectangle((0, 0), (1, 3))], "only 3 of its 6 elements"),
        ([Rectangle((0, 0), (2, 2)), Rectangle((1, 1), (1, 2))], "(0, 0) and (1, 1) overlap"),
        ([Rectangle((1, 0), (2, 3))], "outside"),
        ([Rectangle((-1, 0), (2, 3))], "outside"),
    ],
)
def test_cover_problem(pieces: list[Rectangle], problem: str | None) -> None:
    found = cover_problem((2, 3), pieces)
    assert found == problem if problem is None else problem in str(found)


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_flat_rectangles_are_the_flat_elements_in_order(columns: int, start: int, length: int) -> None:
    found = flat_rectangles(start, start + length, columns)
    assert len(found) <= 3, f"{len(found)} rectangles"
    flat = [
        (row + r) * columns + column + c
        for row, column, rows, width in found
        for r, c in product(range(rows), range(width))
    ]
    assert flat == list(range(start, start + length))
