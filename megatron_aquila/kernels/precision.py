"""Where precision is decided: the type that sums are carried in, and the matrix product that obeys it."""

from typing import Any

import torch
from torch import Tensor

WIDE_ELEMENTS = 2**28  # of a matrix that are widened at a time, 1 GiB in float32: a large model's head has more


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type to compute in for tensors of ``dtype``: float32 for anything shorter, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def multiplies_widened(x: Tensor) -> bool:
    """Whether products of ``x`` are taken on a float32 copy.

    A CPU multiplies bfloat16 and float16 some 80 times slower than float32, and not every CPU kernel sums them in
    float32. A GPU multiplies them natively and sums in float32.
    """
    return x.device.type == "cpu" and compute_dtype(x.dtype) != x.dtype


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the type of ``a``, summed in ``compute_dtype`` and rounded once. Leading dims of ``a`` are rows."""
    if not multiplies_widened(a):
        return a @ b
    wide = a.to(compute_dtype(a.dtype))
    if b.numel() <= WIDE_ELEMENTS:
        return (wide @ b.to(wide.dtype)).to(a.dtype)
    columns = b.tensor_split(-(-b.numel() // WIDE_ELEMENTS), dim=1)
    return torch.cat([(wide @ some.to(wide.dtype)).to(a.dtype) for some in columns], dim=-1)


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply(*args)`` for a Function of one output, with its type."""
    out = function.apply(*args)  # type: ignore[no-untyped-call]  # torch has no types for it
    assert isinstance(out, Tensor), f"{function.__name__} returned {type(out).__name__}"
    return out
