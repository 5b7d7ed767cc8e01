"""The three matrix products of a linear: its output, and the gradients of its input and weight."""

import warnings
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.kernels import fp8
from megatron_aquila.kernels.dispatch import why_unfit
from megatron_aquila.kernels.precision import matmul
from megatron_aquila.kernels.weight_gradient import accumulate_weight_gradient_, weight_gradient

FIRST_WITH_FP8 = (8, 9)  # compute capability of Ada; Hopper is 9.0
# A Hopper aligns the 32 products of an instruction to the largest and keeps some 14 bits of each (DeepSeek-V3, 3.5.2):
# as emulated in the tests, off by up to 2**-11.6 of the sum of all magnitudes.
INSTRUCTION = 2**-10


class Gradients(Protocol):
    """The two products that one gradient of y, grad_y_...O, is in. It is all that they keep of a backward."""

    def grad_x(self, weight: Tensor) -> Tensor:
        """weight_OI -> grad_x_...I."""
        ...

    def grad_weight(self, x: Tensor) -> Tensor:
        """x_...I -> grad_weight_OI."""
        ...

    def add_grad_weight_(self, total: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``, whose type may be wider, without rounding it to the operands' type."""
        ...


class Products(Protocol):
    """How ``y = x @ weight.T`` is computed. Results have the type of the operands; leading dims are rows."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        ...

    def gradients(self, grad_y: Tensor) -> Gradients:
        """What backward multiplies, with ``grad_y`` made ready for both products at once."""
        ...


@dataclass(frozen=True, slots=True)
class NativeGradients:
    """``Gradients`` in the type of the operands."""

    grad_y: Tensor

    def grad_x(self, weight: Tensor) -> Tensor:
        """weight_OI -> grad_x_...I."""
        return matmul(self.grad_y, weight)

    def grad_weight(self, x: Tensor) -> Tensor:
        """x_...I -> grad_weight_OI."""
        return weight_gradient(self.grad_y, x)

    def add_grad_weight_(self, total: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``, not rounded before."""
        accumulate_weight_gradient_(total, self.grad_y, x)


class NativeProducts:
    """In the type of the operands, summed in float32 or wider."""

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        return matmul(x, weight.T)

    def gradients(self, grad_y: Tensor) -> Gradients:
        """grad_y as it is."""
        return NativeGradients(grad_y)


NATIVE = NativeProducts()


FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True, slots=True)
class Fp8Gradients:
    """``Gradients`` in 8 bits: ``rows`` and ``columns`` are those of grad_y, and together as long as it is in bf16.

    ``shape`` and ``dtype`` are grad_y's.
    """

    rows: fp8.Quantized
    columns: fp8.Quantized
    shape: torch.Size
    dtype: torch.dtype
    rounding: fp8.Rounding

    def grad_x(self, weight: Tensor) -> Tensor:
        """weight_OI -> grad_x_...I."""
        columns = self.rounding.columns(weight, FORWARD)
        return _with_leading(self.shape, fp8.product(self.rows, columns, self.dtype))

    def grad_weight(self, x: Tensor) -> Tensor:
        """x_...I -> grad_weight_OI."""
        return self._grad_weight(x, x.dtype)

    def add_grad_weight_(self, total: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``: in a pass of its own, the 8-bit product has no accumulator from outside."""
        total.add_(self._grad_weight(x, torch.float32))

    def _grad_weight(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return fp8.product(self.columns, self.rounding.columns(x.flatten(0, -2), FORWARD), dtype)


@dataclass(frozen=True, slots=True)
class Fp8Products:
    """Of operands rounded to 8 bits, a scale a tensor, summed in float32, or as ``fp8.product`` says of a Hopper.

    What forward multiplies has 3 bits of mantissa (e4m3), what comes from the loss 2 and the wider range (e5m2): the
    pairing of Micikevicius et al., FP8 Formats for Deep Learning (2022). All sizes are multiples of 16.
    """

    rounding: fp8.Rounding = fp8.PLAIN

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        a, b = self.rounding.rows(x.flatten(0, -2), FORWARD), self.rounding.rows(weight, FORWARD)
        return _with_leading(x.shape, fp8.product(a, b, x.dtype))

    def gradients(self, grad_y: Tensor) -> Gradients:
        """grad_y rounded once, in both layouts."""
        rows, columns = self.rounding.both(grad_y.flatten(0, -2), BACKWARD)
        return Fp8Gradients(rows, columns, grad_y.shape, grad_y.dtype, self.rounding)


def _with_leading(shape: torch.Size, rows: Tensor) -> Tensor:
    """``rows`` with the leading dims of ``shape``, as matmul gives them: no view to autograd, so that the rotation of
    q, k and v may write into it.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, [*shape[:-1], rows.shape[-1]])
    return shaped


def fp8_products(device: torch.device) -> Products:
    """8-bit products, tried on ``device`` against the widened values. Raises ``ConfigError`` where they fail.

    On a GPU operands are rounded by our Triton kernels where these give the bits of the plain operations, with a
    warning where they do not.
    """
    why = _why_refused(device)
    if why is not None:
        raise ConfigError([Problem("--precision", "fp8", why, "use bf16")])
    return Fp8Products(_rounding(device))


def _rounding(device: torch.device) -> fp8.Rounding:
    if device.type != "cuda":
        return fp8.PLAIN
    why = why_unfit("triton", device, torch.bfloat16)
    if why is None:
        from megatron_aquila.kernels.triton.fp8 import TritonRounding

        if (why := why_not_plain(TritonRounding(), device)) is None:
            return TritonRounding()
    warnings.warn(f"kernels: {why}; torch's operations round to 8 bits instead, in more passes", RuntimeWarning, 3)
    return fp8.PLAIN


def why_not_plain(rounding: fp8.Rounding, device: torch.device) -> str | None:
    """Why ``rounding`` must not run on ``device``, in a line: it fails, or gives other bits; None if it may."""
    x = torch.randn(144, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(3, -12, 144)[:, None]
    x = x.to(device, torch.bfloat16)  # from the largest to what vanishes: the smallest numbers, too
    other = x.T.contiguous()
    infinite = x.clone()
    infinite[3, 5] = torch.inf
    try:
        ours = [rounding.rows(x, FORWARD), rounding.columns(x, FORWARD), *rounding.both(other, BACKWARD)]
        not_finite = rounding.rows(infinite, FORWARD)
    except Exception as error:  # compilers and drivers raise anything
        return f"rounding by Triton fails: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    right = [fp8.PLAIN.rows(x, FORWARD), fp8.PLAIN.columns(x, FORWARD), *fp8.PLAIN.both(other, BACKWARD)]
    is_same = all(
        torch.equal(a.scale, b.scale) and torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))
        for a, b in zip(ours, right, strict=True)
    )
    if is_same and bool(not_finite.scale.isnan()):
        return None
    return "rounding by Triton is refused, here it does not give the bits of its reference"


def _why_refused(device: torch.device) -> str | None:
    """What is wrong with the device, or the three pairings of types that linears multiply in; None if nothing is."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FIRST_WITH_FP8:
        return f"{torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))}) has no fp8"
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for dtype, result in (
        (FORWARD, torch.bfloat16),
        (BACKWARD, torch.bfloat16),
        (BACKWARD, torch.float32),
    ):
        a, b = fp8.quantized(x, dtype), fp8.quantized(x[:16], FORWARD)
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
