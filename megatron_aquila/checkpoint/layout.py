"""Local parameters and flat optimizer shards as rectangles of logical tensors: views that are written or filled."""

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_aquila.checkpoint.rectangles import Rectangle, flat_rectangles
from megatron_aquila.parallel.params import FlatRange, ParamInfo


@dataclass(frozen=True, slots=True)
class Chunk:
    """One rectangle of the logical tensor ``name``, in memory: written from ``tensor``, or loaded into it in place.

    ``offset`` is its place in ``global_shape``; ``tensor`` has the rectangle's shape. ``replica`` is 0 on the rank that
    saves it; the others hold the same values and only load.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    replica: int = 0

    @property
    def rectangle(self) -> Rectangle:
        """Place and shape."""
        return Rectangle(self.offset, tuple(self.tensor.shape))


def param_chunks(info: ParamInfo, values: Tensor | None = None) -> list[Chunk]:
    """A whole local parameter: one chunk for each of its parts. Padded rows are in none.

    ``values`` stands in for the parameter and has its shape.
    """
    values = info.param.detach() if values is None else values
    assert values.shape == info.param.shape, f"{info.name}: {tuple(values.shape)} is not {tuple(info.param.shape)}"
    rows = [values.narrow(0, part.local_row, part.shape[0]) for part in info.parts]
    for part, view in zip(info.parts, rows, strict=True):
        assert tuple(view.shape) == part.shape, f"{part.name}: rows are {tuple(view.shape)}, the part {part.shape}"
    return [
        Chunk(part.name, part.global_shape, part.offset, view, part.replica)
        for part, view in zip(info.parts, rows, strict=True)
    ]


def range_chunks(owned: FlatRange, values: Tensor, prefix: str = "") -> list[Chunk]:
    """What a sharded optimizer owns of one parameter: at most three chunks for each part of it.

    ``values`` are the ``owned.stop - owned.start`` elements, flat and contiguous: weights, masters or moments; the
    chunks are views of it. ``prefix`` goes before the logical name, e.g. ``optimizer.exp_avg.``.
    """
    count = owned.stop - owned.start
    assert values.shape == (count,), f"{owned.info.name}: a range of {count} elements, values {tuple(values.shape)}"
    columns = math.prod(owned.info.param.shape[1:])
    chunks: list[Chunk] = []
    for part in owned.info.parts:
        assert len(part.shape) in (1, 2), f"{part.name}: {len(part.shape)} dims; parameters have one or two"
        begin = part.local_row * columns
        start, stop = max(owned.start, begin), min(owned.stop, begin + math.prod(part.shape))
        for row, column, rows, width in flat_rectangles(start - begin, stop - begin, columns):
            first = begin + row * columns + column - owned.start
            offset = tuple(base + step for base, step in zip(part.offset, (row, column), strict=False))
            view = values[first : first + rows * width].view((rows, width)[: len(part.shape)])
            chunks.append(Chunk(prefix + part.name, part.global_shape, offset, view, part.replica))
    return chunks
