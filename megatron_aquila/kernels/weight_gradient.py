"""The gradient of a linear's weight: as a tensor of its own, or added to a sum of wider type at once."""

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import matmul, multiplies_widened


def weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``weight`` in ``y = x @ weight.T``, in the type of ``x``: the leading dims of both are rows."""
    return matmul(grad_y.flatten(0, -2).T, x.flatten(0, -2))


def accumulate_weight_gradient_(total: Tensor, grad_y: Tensor, x: Tensor) -> None:
    """Add ``weight_gradient(grad_y, x)`` to ``total`` inside the product, without rounding it to the type of ``x``.

    ``total`` is of that type or of float32. It is rounded once in its own type; the reference below rounds the product
    to the type of ``x`` first, so that the two are near but not bit-equal. To torch.compile it is one opaque op.
    """
    if torch.compiler.is_compiling():
        torch.ops.megatron_aquila.accumulate_weight_gradient_(total, grad_y, x)
    else:  # an op costs time of its own
        _accumulate_(total, grad_y, x)


def _accumulate_(total: Tensor, grad_y: Tensor, x: Tensor) -> None:
    grad_y, x = grad_y.flatten(0, -2), x.flatten(0, -2)
    if multiplies_widened(x):
        torch.addmm(total, grad_y.T.to(total.dtype), x.to(total.dtype), out=total)
    elif total.dtype is x.dtype:
        torch.addmm(total, grad_y.T, x, out=total)
    else:  # only CUDA multiplies 16-bit tensors into a float32 sum
        torch.addmm(total, grad_y.T, x, out_dtype=total.dtype, out=total)


def _shapes(total: Tensor, grad_y: Tensor, x: Tensor) -> None:
    """What the op does where tensors hold nothing: it returns nothing, so no shape follows."""
    sizes = (grad_y.shape[-1], x.shape[-1])
    assert total.shape == sizes, f"a weight's gradient is {sizes}, not {tuple(total.shape)}"


# torch.compile has no rule for addmm with an out_dtype. ``torch.library.custom_op`` costs 0.2 ms a call, this a tenth.
OP = "megatron_aquila::accumulate_weight_gradient_"
torch.library.define(OP, "(Tensor(a!) total, Tensor grad_y, Tensor x) -> ()")
torch.library.impl(OP, "default", _accumulate_)
torch.library.register_fake(OP, _shapes)


def accumulate_weight_gradient_reference_(total: Tensor, grad_y: Tensor, x: Tensor) -> None:
    """The same in two steps: the product in the type of ``x``, then the sum. What autograd's accumulation does."""
    total.add_(weight_gradient(grad_y, x))
