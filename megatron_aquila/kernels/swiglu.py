"""The gated activation of the MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.precision import apply, compute_dtype


def swiglu_reference(gate_up_SB2F: Tensor) -> Tensor:
    """``silu(gate) * up`` of shape SBF, ``gate`` the first half of the last dim; rounded once."""
    gate, up = gate_up_SB2F.to(compute_dtype(gate_up_SB2F.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up_SB2F.dtype)


class _SwiGLU(torch.autograd.Function):
    """Saves its input only; autograd through the reference would save three float32 tensors of its size."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_reference(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        wide = compute_dtype(gate_up.dtype)
        (gate, up), grad = gate_up.to(wide).chunk(2, dim=-1), grad.to(wide)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def swiglu(gate_up_SB2F: Tensor) -> Tensor:
    """``swiglu_reference`` with a backward of its own that keeps little memory."""
    return apply(_SwiGLU, gate_up_SB2F)


def swiglu_triton(gate_up_SB2F: Tensor) -> Tensor:
    """``swiglu`` by our Triton kernel: one pass over memory forward, one backward."""
    from megatron_aquila.kernels.triton.swiglu import SwiGLU

    return apply(SwiGLU, gate_up_SB2F)
