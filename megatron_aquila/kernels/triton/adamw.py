"""AdamW on flat tensors in one pass: gradient, weight and moments read, weight, moments and the 16-bit copy written."""

import math
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, publish, step, factor, applies, size, lr, decay, add1, beta2, add2, eps,
    LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, PUBLISHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Element by element in the order of ``adamw_``. Root and quotients are rounded to nearest: memory is the limit.

    Bias corrections are taken in float64: 1 - beta**step of the first steps would lose half its digits in float32.
    """
    if tl.load(applies):
        count = tl.load(step).to(tl.float64)
        correction1 = (1.0 - tl.exp2(count * LOG2_BETA1)).to(tl.float32)
        correction2 = tl.sqrt_rn((1.0 - tl.exp2(count * LOG2_BETA2)).to(tl.float32))
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(factor).to(tl.float32)
        mean = tl.load(exp_avg + at, mask=inside, other=0.0)
        square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        weight = tl.load(param + at, mask=inside, other=0.0) * decay
        mean += (g - mean) * add1
        square = square * beta2 + g * g * add2
        denominator = tl.div_rn(tl.sqrt_rn(square), correction2) + eps
        weight -= lr / correction1 * tl.div_rn(mean, denominator)
        tl.store(param + at, weight, mask=inside)
        tl.store(exp_avg + at, mean, mask=inside)
        tl.store(exp_avg_sq + at, square, mask=inside)
        if PUBLISHES:
            tl.store(publish + at, weight.to(publish.dtype.element_ty), mask=inside)


def _log2(beta: float) -> float:
    """The logarithm of ``beta``; that of 0 is as large as makes no difference."""
    return math.log2(max(beta, sys.float_info.min))


def update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Tensor,
    factor: Tensor,
    applies: Tensor,
    publish: Tensor | None,
) -> None:
    """What ``adamw_triton_`` says."""
    tensors = [param, grad, exp_avg, exp_avg_sq]
    assert all(x.dtype is torch.float32 and x.is_contiguous() for x in tensors), (
        f"one contiguous float32 each, not {[(x.dtype, x.stride()) for x in tensors]}"
    )
    assert publish is None or publish.shape == param.shape, "publish is not like param"
    if param.numel() == 0:
        return
    _update[(triton.cdiv(param.numel(), BLOCK),)](
        param, grad, exp_avg, exp_avg_sq, param if publish is None else publish, step, factor, applies, param.numel(),
        lr, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
        LOG2_BETA1=_log2(beta1), LOG2_BETA2=_log2(beta2), PUBLISHES=publish is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
