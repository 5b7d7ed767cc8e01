"""The three matrix products of a linear: its output, and the gradients of its input and weight."""

from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.kernels import fp8
from megatron_aquila.kernels.precision import matmul
from megatron_aquila.kernels.weight_gradient import accumulate_weight_gradient_, weight_gradient

FIRST_WITH_FP8 = (8, 9)  # compute capability of Ada; Hopper is 9.0
# A Hopper aligns the 32 products of an instruction to the largest and keeps some 14 bits of each (DeepSeek-V3, 3.5.2):
# as emulated in the tests, off by up to 2**-11.6 of the sum of all magnitudes.
INSTRUCTION = 2**-10


class Products(Protocol):
    """How ``y = x @ weight.T`` is computed. Results have the type of the operands; leading dims are rows."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        ...

    def grad_x(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        """grad_y_...O, weight_OI -> grad_x_...I."""
        ...

    def grad_weight(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """grad_y_...O, x_...I -> grad_weight_OI."""
        ...

    def add_grad_weight_(self, total: Tensor, grad_y: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``, whose type may be wider, without rounding it to the operands' type."""
        ...


class NativeProducts:
    """In the type of the operands, summed in float32 or wider."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        return matmul(x, weight.T)

    def grad_x(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        """grad_y_...O, weight_OI -> grad_x_...I."""
        return matmul(grad_y, weight)

    def grad_weight(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """grad_y_...O, x_...I -> grad_weight_OI."""
        return weight_gradient(grad_y, x)

    def add_grad_weight_(self, total: Tensor, grad_y: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``, not rounded before."""
        accumulate_weight_gradient_(total, grad_y, x)


NATIVE = NativeProducts()


class Fp8Products:
    """Of operands rounded to 8 bits, a scale a tensor, summed in float32, or as ``fp8.product`` says of a Hopper.

    What forward multiplies has 3 bits of mantissa (e4m3), what comes from the loss 2 and the wider range (e5m2): the
    pairing of Micikevicius et al., FP8 Formats for Deep Learning (2022). All sizes are multiples of 16.
    """

    forward: ClassVar[torch.dtype] = torch.float8_e4m3fn
    backward: ClassVar[torch.dtype] = torch.float8_e5m2

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        rows = fp8.quantized(x.flatten(0, -2), self.forward)
        return _with_leading(x, fp8.product(rows, fp8.quantized(weight, self.forward), x.dtype))

    def grad_x(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        """grad_y_...O, weight_OI -> grad_x_...I."""
        rows = fp8.quantized(grad_y.flatten(0, -2), self.backward)
        return _with_leading(grad_y, fp8.product(rows, fp8.quantized(weight.T, self.forward), grad_y.dtype))

    def grad_weight(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """grad_y_...O, x_...I -> grad_weight_OI."""
        return self._grad_weight(grad_y, x, x.dtype)

    def add_grad_weight_(self, total: Tensor, grad_y: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``: in a pass of its own, the 8-bit product has no accumulator from outside."""
        total.add_(self._grad_weight(grad_y, x, torch.float32))

    def _grad_weight(self, grad_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        rows = fp8.quantized(grad_y.flatten(0, -2).T, self.backward)
        return fp8.product(rows, fp8.quantized(x.flatten(0, -2).T, self.forward), dtype)


def _with_leading(like: Tensor, rows: Tensor) -> Tensor:
    """``rows`` with the leading dims of ``like``, as matmul gives them: no view to autograd, so that the rotation of q,
    k and v may write into it.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, [*like.shape[:-1], rows.shape[-1]])
    return shaped


def fp8_products(device: torch.device) -> Products:
    """8-bit products, tried on ``device`` against the widened values. Raises ``ConfigError`` where they fail."""
    why = _why_refused(device)
    if why is not None:
        raise ConfigError([Problem("--precision", "fp8", why, "use bf16")])
    return Fp8Products()


def _why_refused(device: torch.device) -> str | None:
    """What is wrong with the device, or the three pairings of types that linears multiply in; None if nothing is."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FIRST_WITH_FP8:
        return f"{torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))}) has no fp8"
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for dtype, result in (
        (Fp8Products.forward, torch.bfloat16),
        (Fp8Products.backward, torch.bfloat16),
        (Fp8Products.backward, torch.float32),
    ):
        a, b = fp8.quantized(x, dtype), fp8.quantized(x[:16], Fp8Products.forward)
        try:
            ours, reference = fp8.product(a, b, result), fp8.product_reference(a, b, result)
        except Exception as error:  # libraries and drivers raise anything
            return f"its products fail: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        sizes = [replace(matrix, values=matrix.values.float().abs()) for matrix in (a, b)]
        magnitudes = fp8.product_reference(sizes[0], sizes[1], torch.float32)
        allowed = torch.finfo(result).eps * reference.abs() + INSTRUCTION * magnitudes
        if not ((ours - reference).abs() <= allowed).all():
            return f"a product of {dtype} into {result} is not that of the widened values"
    return None
