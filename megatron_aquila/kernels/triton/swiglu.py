"""SwiGLU: one pass over memory forward and one backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aquila.kernels.triton.launch import as_rows, block_of, num_warps

BLOCK = 2048


@triton.jit
def swiglu_forward(gate_up, out, gate_up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    at = gate_up + row * gate_up_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(gate_up, grad, grad_gate_up, gate_up_stride, grad_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row, of gate and of up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    at = gate_up + row * gate_up_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=inside, other=0.0).to(tl.float32)
    grad_out = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad_out * up * (sigmoid + silu * (1.0 - sigmoid))
    to = grad_gate_up + row * (2 * SIZE) + column
    tl.store(to, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(to + SIZE, (grad_out * silu).to(grad_gate_up.dtype.element_ty), mask=inside)


def _grid(num_rows: int, size: int, block: int) -> tuple[int, int]:
    return num_rows, triton.cdiv(size, block)


class SwiGLU(torch.autograd.Function):
    """Saves its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        ctx.save_for_backward(gate_up)
        rows, size = as_rows(gate_up), gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
        block = min(BLOCK, block_of(size))
        if out.numel() > 0:
            swiglu_forward[_grid(rows.shape[0], size, block)](
                rows, out, rows.stride(0), SIZE=size, BLOCK=block, num_warps=num_warps(block)
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradients of gate and up, written into one tensor."""
        (gate_up,) = ctx.saved_tensors
        rows, grads, size = as_rows(gate_up), as_rows(grad), grad.shape[-1]
        grad_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        block = min(BLOCK, block_of(size))
        if grad.numel() > 0:
            swiglu_backward[_grid(rows.shape[0], size, block)](
                rows, grads, grad_gate_up, rows.stride(0), grads.stride(0),
                SIZE=size, BLOCK=block, num_warps=num_warps(block),
            )  # fmt: skip
        return grad_gate_up
