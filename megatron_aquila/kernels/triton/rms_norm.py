"""RMSNorm, alone or with the residual added before it: one pass over memory forward and one backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aquila.kernels.triton.launch import as_rows, block_of, num_programs, num_warps

LARGEST_ROW = 32768
SHARED_BYTES = 96 * 1024  # for the loads that are under way: two programs fit into the 227 KiB of a Hopper processor


@triton.jit
def rms_norm_forward(
    x, residual, weight, total, y, inverse_rms, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
):  # fmt: skip
    """A row, which is added to and normed in one program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * SIZE + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / SIZE + eps)
    tl.store(inverse_rms + row, scale)
    normed = value * scale
    if ROUNDS_FIRST:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + column, (normed * gain).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    x, weight, inverse_rms, grad_y, grad_total, grad_x, grad_weight_parts,
    x_stride, grad_y_stride, grad_total_stride, num_rows,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, ROUNDS_FIRST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes the rows p, p + programs, ...: the weight's gradient stays in registers until its one store.

    STAGES rows are under way at a time, so that the sums over a row do not stall the loads of the next.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(program, num_rows, tl.num_programs(0), num_stages=STAGES):
        value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + row * grad_y_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse_rms + row)
        normed = value * scale
        grad_normed = grad * gain
        mean = tl.sum(grad_normed * normed, axis=0) / SIZE
        out = scale * (grad_normed - normed * mean)
        if ADDS:
            out += tl.load(grad_total + row * grad_total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * SIZE + column, out.to(grad_x.dtype.element_ty), mask=inside)
        if ROUNDS_FIRST:
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
        part += grad * normed
    tl.store(grad_weight_parts + program * SIZE + column, part, mask=inside)


def _stages(block: int, element_size: int, num_loads: int) -> int:
    """The row that is computed and those whose loads are under way, in shared memory: three in all where they fit."""
    return min(3, 1 + SHARED_BYTES // (block * element_size * num_loads))


def _programs(num_rows: int, block: int, device: torch.device) -> int:
    """Two programs of 8 warps a processor or one of 16: more do not fit its registers (94 to 128 a thread)."""
    return num_programs(num_rows, device, per_processor=2 if num_warps(block) <= 8 else 1)


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounds_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x + residual, its norm, 1 / rms of each row)``; the first is ``x`` where nothing is added."""
    size = x.shape[-1]
    assert size <= LARGEST_ROW, f"a row of {size} does not fit into one program; {LARGEST_ROW} do"
    rows = as_rows(x)
    added = rows if residual is None else as_rows(residual)
    assert added.shape == rows.shape, f"rows {tuple(added.shape)} are added to {tuple(rows.shape)}"
    assert added.dtype is x.dtype, f"{added.dtype} is added to {x.dtype}"
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    inverse_rms = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    block = block_of(size)
    if rows.numel() > 0:
        rms_norm_forward[(rows.shape[0],)](
            rows, added, weight, total, y, inverse_rms, rows.stride(0), added.stride(0), eps,
            SIZE=size, BLOCK=block, ADDS=residual is not None, ROUNDS_FIRST=rounds_first, num_warps=num_warps(block),
        )  # fmt: skip
    return total, y, inverse_rms


def _gradients(
    x: Tensor, weight: Tensor, inverse_rms: Tensor, grad_y: Tensor, grad_total: Tensor | None, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and of the weight. No atomics: the parts of the latter are summed in one order."""
    rows, grads = as_rows(x), as_rows(grad_y)
    others = grads if grad_total is None else as_rows(grad_total)
    num_rows, size = rows.shape
    block = block_of(size)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = _programs(num_rows, block, x.device)
    parts = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    if rows.numel() > 0:
        rms_norm_backward[(programs,)](
            rows, weight, inverse_rms, grads, others, grad_x, parts,
            rows.stride(0), grads.stride(0), others.stride(0), num_rows,
            SIZE=size, BLOCK=block, ADDS=grad_total is not None, ROUNDS_FIRST=rounds_first,
            STAGES=_stages(block, x.element_size(), 2 + (grad_total is not None)), num_warps=num_warps(block),
        )  # fmt: skip
    return grad_x, parts.sum(0).to(weight.dtype)


class RmsNorm(torch.autograd.Function):
    """Saves ``x``, ``weight`` and a float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rounds_first: bool) -> Tensor:
        """``x / rms(x) * weight``."""
        _, y, inverse_rms = _normalise(x, None, weight, eps, rounds_first)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.rounds_first = rounds_first
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of ``x`` and ``weight``."""
        x, weight, inverse_rms = ctx.saved_tensors
        return *_gradients(x, weight, inverse_rms, grad_y, None, ctx.rounds_first), None, None


class AddRmsNorm(torch.autograd.Function):
    """Saves the sum, ``weight`` and a float32 a row. The gradient that comes to the sum is added within the kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounds_first: bool
    ) -> tuple[Tensor, Tensor]:
        """``x + residual`` and its norm."""
        total, y, inverse_rms = _normalise(x, residual, weight, eps, rounds_first)
        ctx.save_for_backward(total, weight, inverse_rms)
        ctx.rounds_first = rounds_first
        ctx.set_materialize_grads(False)  # zeros would be read at full price
        return total, y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of ``x`` and ``residual``, which are one tensor, and of ``weight``."""
        if grad_y is None:
            return grad_total, grad_total, None, None, None
        total, weight, inverse_rms = ctx.saved_tensors
        grad, grad_weight = _gradients(total, weight, inverse_rms, grad_y, grad_total, ctx.rounds_first)
        return grad, grad, grad_weight, None, None
