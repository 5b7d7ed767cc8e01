"""Random initial weights that do not depend on the layout: any rectangle of a tensor can be drawn by itself."""

import hashlib
from itertools import product

import numpy as np
import torch
from torch import Tensor

TILE = 128  # rows and columns of a tile; changing it changes every initial weight


def normal_rectangle(
    name: str, *, seed: int, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], std: float
) -> Tensor:
    """Rectangle ``offset`` .. ``offset + shape`` of the 2-D tensor ``name``, from N(0, std^2), float32 on the CPU.

    The tensor is a grid of fixed tiles, each a function of (seed, name, its place): any split gives the same values,
    and only the tiles it touches are drawn. numpy's Philox and not torch's generator: its key has 128 bits (torch's CPU
    generator uses 32 of the seed, so that tiles of a large model would repeat), and all CPUs draw the same values.
    """
    assert len(global_shape) == len(offset) == len(shape) == 2, f"{name} has shape {global_shape}; 2-D is drawn"
    assert all(o >= 0 and o + n <= g for g, o, n in zip(global_shape, offset, shape, strict=True)), (
        f"{name}: {shape} at {offset} is outside {global_shape}"
    )
    out = np.empty(shape, dtype=np.float32)
    tile_rows, tile_columns = (range(o // TILE, -(-(o + n) // TILE)) for o, n in zip(offset, shape, strict=True))
    for row, column in product(tile_rows, tile_columns):
        here, there = zip(_overlap(row, offset[0], shape[0]), _overlap(column, offset[1], shape[1]), strict=True)
        out[here] = _tile(name, seed, row, column)[there]
    return torch.from_numpy(out).mul_(std)


def _tile(name: str, seed: int, row: int, column: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Standard normal values of one tile."""
    key = hashlib.blake2b(f"{seed}/{name}/{row}/{column}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal((TILE, TILE), dtype=np.float32)


def _overlap(tile: int, offset: int, size: int) -> tuple[slice, slice]:
    """Where tile number ``tile`` of a dim and ``offset .. offset + size`` meet: in the rectangle and in the tile."""
    start, stop = max(tile * TILE, offset), min((tile + 1) * TILE, offset + size)
    return slice(start - offset, stop - offset), slice(start - tile * TILE, stop - tile * TILE)
