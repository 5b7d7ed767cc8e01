"""A matrix rounded to 8 bits: one pass for its largest value, one that writes it by rows, by columns or both."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_aquila.kernels.fp8 import SMALLEST, Quantized
from megatron_aquila.kernels.triton.launch import as_rows

BLOCK = 128  # of either size: 256 bytes of a row are read, 128 of a row and of a column written
NUM_WARPS = 8


@triton.jit
def fp8_largest(x, largest, num_rows, num_columns, x_stride, BLOCK: tl.constexpr):
    """The bits of the largest magnitude as float32; ordered as it is, above infinity's there are only those of NaN."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    bits = tl.load(x + row * x_stride + column, mask=(row < num_rows) & (column < num_columns), other=0)
    magnitude = (bits.to(tl.int32) & 0x7FFF) << 16
    tl.atomic_max(largest, tl.max(tl.max(magnitude, axis=1), axis=0), sem="relaxed")


@triton.jit
def fp8_cast(
    x, largest, scale, by_rows, by_columns, num_rows, num_columns, x_stride,
    TOP: tl.constexpr, TINY: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scale of ``quantized``, and the values rounded to nearest even in float32, so that their cast is exact.

    ``x`` has the bits of bfloat16. ``TINY``: the bits of the smallest normal 8-bit number as float32.
    """
    bits = tl.load(largest)
    share = tl.div_rn(bits.to(tl.float32, bitcast=True), TOP)
    exponent = tl.maximum((share.to(tl.int32, bitcast=True) >> 23) - 126, SMALLEST)
    exponent = tl.where(share == 0.0, 0, exponent)
    is_finite = bits < 0x7F800000
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, tl.where(is_finite, (127 + exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True))
    by = tl.where(is_finite, (127 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.int32) << 16
    value = (value.to(tl.float32, bitcast=True) * by).to(tl.int32, bitcast=True)
    # 1.5 * 2**23 units of the last 8-bit place: added and taken off again, it leaves no more than whole units
    units = tl.maximum(value & 0x7F800000, TINY) + ((23 - MANTISSA) << 23) | 0x400000
    units = units.to(tl.float32, bitcast=True)
    rounded = ((value.to(tl.float32, bitcast=True) + units) - units).to(tl.int32, bitcast=True)
    rounded = (rounded | (value & -0x80000000)).to(tl.float32, bitcast=True)  # also a zero's sign
    narrow = rounded.to(by_rows.dtype.element_ty)
    if ROWS:
        tl.store(by_rows + row * num_columns + column, narrow, mask=inside)
    if COLUMNS:
        tl.store(by_columns + tl.trans(column * num_rows + row), tl.trans(narrow), mask=tl.trans(inside))


class TritonRounding:
    """A ``Rounding`` of bfloat16: two passes that read, the second of which writes."""

    def rows(self, x: Tensor, dtype: torch.dtype) -> Quantized:
        """``quantized(x, dtype)``."""
        values = torch.empty(x.shape, dtype=dtype, device=x.device)
        return Quantized(values, _round(x, values, None))

    def columns(self, x: Tensor, dtype: torch.dtype) -> Quantized:
        """``quantized(x.T, dtype)``."""
        values = torch.empty(x.shape[::-1], dtype=dtype, device=x.device)
        return Quantized(values, _round(x, None, values))

    def both(self, x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
        """``rows`` and ``columns``, written together."""
        by_rows, by_columns = (torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.shape[::-1]))
        scale = _round(x, by_rows, by_columns)
        return Quantized(by_rows, scale), Quantized(by_columns, scale)


def _round(x: Tensor, by_rows: Tensor | None, by_columns: Tensor | None) -> Tensor:
    """Fills what is there of the two and returns the scale."""
    assert x.dtype is torch.bfloat16, f"operands are bfloat16, not {x.dtype}"
    bits, (num_rows, num_columns) = as_rows(x).view(torch.int16), x.shape
    largest = torch.zeros((), dtype=torch.int32, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_rows, BLOCK), triton.cdiv(num_columns, BLOCK))
    fp8_largest[grid](bits, largest, num_rows, num_columns, bits.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS)
    one = by_columns if by_rows is None else by_rows
    assert one is not None, "rows, columns or both are to be filled"
    info = torch.finfo(one.dtype)
    fp8_cast[grid](
        bits, largest, scale, one, one if by_columns is None else by_columns, num_rows, num_columns, bits.stride(0),
        TOP=info.max, TINY=(126 + math.frexp(info.tiny)[1]) << 23, MANTISSA=1 - math.frexp(info.eps)[1],
        SMALLEST=SMALLEST, ROWS=by_rows is not None, COLUMNS=by_columns is not None,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return scale
