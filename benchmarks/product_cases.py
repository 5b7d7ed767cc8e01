"""The kernels' cases of matrix products: weight gradients in float32, and fp8."""

from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.case import Case, Cases, Size, Work, draw
from megatron_aquila.kernels.products import NATIVE, Products, fp8_products
from megatron_aquila.kernels.weight_gradient import (
    accumulate_weight_gradient_,
    accumulate_weight_gradient_reference_,
)


def _operands(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Work]:
    """Input, weight and output's gradient of a gate and up projection, and the work of one product."""
    tokens, n, k = size.seq_len * size.batch, 2 * size.shape.ffn_size, size.shape.hidden_size
    x, weight, grad_y = (draw(device, dtype, *sizes) for sizes in ((tokens, k), (n, k), (tokens, n)))
    return x, weight, grad_y, Work(2 * tokens * n * k, "TFLOP/s")


def _weight_gradient(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    x, weight, grad_y, work = _operands(size, device, dtype)
    total = torch.zeros(weight.shape, device=device)

    def call(kernel: object, total: Tensor, grad_y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        assert callable(kernel), f"{kernel} is no kernel"
        kernel(total, grad_y, x)
        return (total,)

    return Case(
        op="weight_gradient",
        reference=accumulate_weight_gradient_reference_,
        inputs=(total, grad_y, x),
        call=call,
        forward=work,
        kernels={"own, within the product": lambda: accumulate_weight_gradient_},
    )


def _output(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    x, weight, _, work = _operands(size, device, dtype)
    return Case(
        op="products",
        reference=NATIVE.output,
        inputs=(x, weight),
        call=lambda kernel, x, weight: (kernel(x, weight),),
        forward=work,
        kernels={"fp8, rounding included": lambda: fp8_products(device).output},
    )


def _gradients(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    """Of input and weight together: what is multiplied twice is rounded once."""
    x, weight, grad_y, work = _operands(size, device, dtype)

    def both(products: Products, x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        gradients = products.gradients(grad_y)
        return gradients.grad_x(weight), gradients.grad_weight(x)

    return Case(
        op="products",
        reference=partial(both, NATIVE),
        inputs=(x, weight, grad_y),
        call=lambda kernel, x, weight, grad_y: kernel(x, weight, grad_y),
        forward=Work(2 * work.amount, work.unit),
        kernels={"fp8, rounding included": lambda: partial(both, fp8_products(device))},
    )


PRODUCT_CASES: Cases = MappingProxyType(
    {
        "weight_gradient": _weight_gradient,
        "products, output": _output,
        "products, gradients": _gradients,
    }
)
