"""Rectangles of a logical tensor: where shards meet and whether they cover it. Pure arithmetic, no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rectangle:
    """The elements ``offset[d] : offset[d] + shape[d]`` of each dim ``d`` of some tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """First index behind it, in each dim."""
        return tuple(offset + size for offset, size in zip(self.offset, self.shape, strict=True))

    def intersection(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold; ``None`` when that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(stop - start for start, stop in zip(offset, map(min, self.stop, other.stop), strict=True))
        return Rectangle(offset, shape) if all(size > 0 for size in shape) else None

    def within(self, outer: "Rectangle") -> tuple[slice, ...]:
        """Indices of this rectangle in a tensor that holds ``outer``."""
        starts = tuple(mine - theirs for mine, theirs in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


def flat_rectangles(start: int, stop: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Elements ``start : stop`` of a flattened matrix as at most three rectangles ``(row, column, rows, width)``.

    The end of a row, whole rows, the beginning of a row: in the order of the flat elements.
    """
    out: list[tuple[int, int, int, int]] = []
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows, width = (stop - start) // columns, columns
        else:
            rows, width = 1, min(stop - start, columns - column)
        out.append((row, column, rows, width))
        start += rows * width
    return out


def cover_problem(shape: tuple[int, ...], rectangles: Iterable[Rectangle]) -> str | None:
    """Why ``rectangles`` do not hold every element of a tensor of ``shape`` exactly once; ``None`` when they do.

    A sweep along the first dim: linear in practice, as few shards share a row.
    """
    count = 0
    active: list[Rectangle] = []
    for rectangle in sorted(rectangles, key=lambda r: r.offset):
        if any(start < 0 for start in rectangle.offset) or any(map(int.__gt__, rectangle.stop, shape)):
            return f"the piece at {rectangle.offset} of shape {rectangle.shape} reaches outside its shape {shape}"
        active = [other for other in active if other.stop[0] > rectangle.offset[0]]
        for other in active:
            if rectangle.intersection(other) is not None:
                return f"the pieces at {other.offset} and {rectangle.offset} overlap"
        active.append(rectangle)
        count += rectangle.numel
    total = math.prod(shape)
    return None if count == total else f"only {count} of its {total} elements are held by any rank"
