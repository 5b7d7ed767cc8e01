"""The kernels' cases of matrix products: the loss with its projection, weight gradients in float32, and fp8."""

from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Cases, Make, Size, Work, draw
from benchmarks.liger import liger_linear_cross_entropy
from megatron_aquila.kernels.cross_entropy import cross_entropy
from megatron_aquila.kernels.products import NATIVE, Products, fp8_products
from megatron_aquila.kernels.weight_gradient import (
    accumulate_weight_gradient_,
    accumulate_weight_gradient_reference_,
)
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab_loss import linear_vocab_parallel_cross_entropy

MOST_TOKENS = 2**13  # of the loss: its reference holds their logits in float64


def _linear_cross_entropy(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    """The mean loss and its gradients, which ours computes in forward: both directions are one."""
    shape = size.shape
    tokens = min(size.seq_len * size.batch, MOST_TOKENS)
    x = draw(device, dtype, tokens, shape.hidden_size)
    weight = draw(device, dtype, shape.padded_vocab_size, shape.hidden_size) / shape.hidden_size**0.5
    labels = torch.randint(shape.vocab_size, (tokens,), device=device)
    tp = ParallelContext.single(device).tp
    placement = Placement(tp=tp, sequence_parallel=False, dtype=dtype, device=device)
    weights = torch.full((tokens, 1), 1 / tokens, device=device)

    def own(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss_SB = linear_vocab_parallel_cross_entropy(
            x.unsqueeze(1), weight, labels.unsqueeze(1), weights, placement=placement, vocab_size=shape.vocab_size
        )
        return (loss_SB * weights).sum()

    kernels: dict[str, Make] = {"own, in chunks": lambda: own, "liger-kernel": liger_linear_cross_entropy}
    kernels["torch's linear_cross_entropy"] = lambda: F.linear_cross_entropy  # from 2.13 on
    return Case(
        op="linear_cross_entropy",
        reference=lambda x, weight, labels: cross_entropy(x @ weight.T, labels, vocab_size=shape.vocab_size).mean(),
        inputs=(x, weight),
        call=lambda kernel, x, weight: (kernel(x, weight, labels),),
        both=Work(6 * tokens * shape.vocab_size * shape.hidden_size, "TFLOP/s"),
        kernels=kernels,
        gradients=(torch.ones((), device=device),),
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
        "linear_cross_entropy": _linear_cross_entropy,
        "weight_gradient": _weight_gradient,
        "products, output": _output,
        "products, gradients": _gradients,
    }
)
