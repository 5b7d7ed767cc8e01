"""Root-mean-square normalisation, in Aquila's and in Llama's order of rounding."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.precision import apply, compute_dtype

Order = Literal["aquila", "llama"]


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
    """``x / rms(x) * weight`` over the last dim, computed in ``compute_dtype``, in the type of ``x``.

    ``aquila`` multiplies by the weight before it rounds, ``llama`` rounds first: in bfloat16 they differ.
    """
    wide = x.to(compute_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if order == "llama":
        return (normed.to(x.dtype) * weight).to(x.dtype)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """Saves ``x``, ``weight`` and a number a row; autograd through the reference would save float32 copies of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, order: Order) -> Tensor:
        wide = x.to(compute_dtype(x.dtype))
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.order = order
        normed = wide * inverse_rms
        if order == "llama":
            return (normed.to(x.dtype) * weight).to(x.dtype)
        return (normed * weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        wide = grad.to(inverse_rms.dtype)
        normed = x.to(wide.dtype) * inverse_rms
        grad_normed = wide * weight.to(wide.dtype)
        grad_x = inverse_rms * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
        scaled = normed.to(x.dtype).to(wide.dtype) if ctx.order == "llama" else normed
        grad_weight = (wide * scaled).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
    """``rms_norm_reference`` with a backward of its own that keeps little memory."""
    return apply(_RmsNorm, x, weight, eps, order)


def rms_norm_torch(x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
    """torch's own kernel, one pass on a GPU. It rounds in Aquila's order; Llama's goes to ``rms_norm``."""
    if order == "llama":
        return rms_norm(x, weight, eps=eps, order=order)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_triton(x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
    """``rms_norm`` by our Triton kernel: one pass over memory forward, one backward, the same bits in every run."""
    from megatron_aquila.kernels.triton.rms_norm import RmsNorm

    return apply(RmsNorm, x, weight, eps, order == "llama")


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: Order
) -> tuple[Tensor, Tensor]:
    """``(x + residual, rms_norm_reference of it)``: the residual stream goes on, and what the next layer takes."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps=eps, order=order)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: Order) -> tuple[Tensor, Tensor]:
    """``add_rms_norm_reference`` by ``rms_norm``."""
    total = x + residual
    return total, rms_norm(total, weight, eps=eps, order=order)


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: Order
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm_reference`` by ``rms_norm_torch``."""
    total = x + residual
    return total, rms_norm_torch(total, weight, eps=eps, order=order)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: Order
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm_reference`` in one pass. Backward adds the sum's own gradient before it rounds, once not twice."""
    from megatron_aquila.kernels.triton.rms_norm import AddRmsNorm

    total, normed = AddRmsNorm.apply(x, residual, weight, eps, order == "llama")  # type: ignore[no-untyped-call]
    return total, normed
