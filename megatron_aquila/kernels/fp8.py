"""Matrices of 8-bit numbers with one scale each, and their product."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MULTIPLE = 16  # both sizes of a matrix that tensor cores multiply in 8 bits
SMALLEST = -120  # exponent of a scale: it and its reciprocal are normal float32 and bfloat16 numbers


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix as ``values * scale``: contiguous 8-bit values and a float32 scalar on the device."""

    values: Tensor
    scale: Tensor


class Rounding(Protocol):
    """What rounds operands: to the same bits, whoever does it, unless a value is not finite: then all are NaN."""

    def rows(self, x: Tensor, dtype: torch.dtype) -> Quantized:
        """``quantized(x, dtype)``."""
        ...

    def columns(self, x: Tensor, dtype: torch.dtype) -> Quantized:
        """``quantized(x.T, dtype)``."""
        ...

    def both(self, x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
        """``rows`` and ``columns``."""
        ...


class PlainRounding:
    """In torch's operations: the largest value, a product, a cast, by columns a copy: each a pass over memory."""

    def rows(self, x: Tensor, dtype: torch.dtype) -> Quantized:
        """``quantized(x, dtype)``."""
        return quantized(x, dtype)

    def columns(self, x: Tensor, dtype: torch.dtype) -> Quantized:
        """``quantized(x.T, dtype)``."""
        return quantized(x.T, dtype)

    def both(self, x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
        """``rows`` and ``columns``: rounded once."""
        rows = quantized(x, dtype)
        return rows, Quantized(rows.values.T.contiguous(), rows.scale)


def quantized(x: Tensor, dtype: torch.dtype) -> Quantized:
    """The matrix ``x`` rounded to ``dtype`` after a power of two has brought its largest value to the top of the range.

    By a power of two, so that a value is rounded alike whatever its tensor's largest is: how a matrix is split over
    ranks changes only what falls below the smallest normal number, for e4m3 2**-15 of the largest. A value that is not
    finite makes all of it NaN. Waits for nothing on the host.
    """
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dtype=torch.float32)
    mantissa, exponent = torch.frexp(largest / torch.finfo(dtype).max)  # a mantissa of 0.5 to 1: 2**exponent suffices
    scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=SMALLEST))
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return Quantized((x * scale.reciprocal().to(x.dtype)).to(dtype).contiguous(), scale)


PLAIN = PlainRounding()


def product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a_MK @ b_NK.T -> y_MN in ``dtype``, by torch's scaled product: summed in float32, on a GPU by tensor cores.

    Those of a Hopper keep some 14 bits of the terms of one instruction; float32 are their sums.
    """
    _check_sizes(a, b)
    return torch._scaled_mm(a.values, b.values.T, scale_a=a.scale, scale_b=b.scale, out_dtype=dtype)


def product_reference(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """``product`` of the widened values."""
    _check_sizes(a, b)
    return (a.values.float() @ b.values.float().T * (a.scale * b.scale)).to(dtype)


def _check_sizes(a: Quantized, b: Quantized) -> None:
    sizes = [*a.values.shape, *b.values.shape]
    assert all(size % MULTIPLE == 0 for size in sizes), f"sizes {sizes} are not all multiples of {MULTIPLE}"
