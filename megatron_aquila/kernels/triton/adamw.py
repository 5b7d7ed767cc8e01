"""AdamW on flat tensors in one pass: gradient, weight and moments read, weight, moments and the 16-bit copy written."""

import math
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def adamw_update(
    param, grad, exp_avg, exp_avg_sq, other, step, factor, applies, size, lr, decay, add1, beta2, add2, eps,
    LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Element by element in the order of ``adamw_``. Root and quotients are rounded to nearest: memory is the limit.

    ``other`` is what OTHER says: the weights to "publish", or the "remainder" of ``param``, which is then given as
    integers. Bias corrections are taken in float64: in float32, 1 - beta**step of the first steps would lose digits.
    """
    if tl.load(applies):
        count = tl.load(step).to(tl.float64)
        correction1 = (1.0 - tl.exp2(count * LOG2_BETA1)).to(tl.float32)
        correction2 = tl.sqrt_rn((1.0 - tl.exp2(count * LOG2_BETA2)).to(tl.float32))
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(factor).to(tl.float32)
        mean = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(param + at, mask=inside, other=0)
        if OTHER == "remainder":
            rest = tl.load(other + at, mask=inside, other=0).to(tl.int32)
            weight = ((weight.to(tl.int32) << 16) + rest).to(tl.float32, bitcast=True)
        weight *= decay
        mean += (g - mean) * add1
        square = square * beta2 + g * g * add2
        denominator = tl.div_rn(tl.sqrt_rn(square), correction2) + eps
        weight -= lr / correction1 * tl.div_rn(mean, denominator)
        if OTHER == "remainder":
            bits = weight.to(tl.int32, bitcast=True)
            rest = bits.to(tl.int16)
            tl.store(other + at, rest, mask=inside)
            tl.store(param + at, ((bits - rest.to(tl.int32)) >> 16).to(tl.int16), mask=inside)
        else:
            tl.store(param + at, weight, mask=inside)
        if OTHER == "publish":
            tl.store(other + at, weight.to(other.dtype.element_ty), mask=inside)
        tl.store(exp_avg + at, mean.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, square.to(exp_avg_sq.dtype.element_ty), mask=inside)


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
    remainder: Tensor | None,
) -> None:
    """What ``adamw_triton_`` says."""
    assert publish is None or remainder is None, "a parameter with a remainder is the weight itself"
    kind, other = ("publish", publish) if remainder is None else ("remainder", remainder)
    types = [torch.float32 if remainder is None else torch.bfloat16, torch.float32, exp_avg.dtype, exp_avg.dtype]
    tensors = [param, grad, exp_avg, exp_avg_sq]
    assert [(x.dtype, x.is_contiguous()) for x in tensors] == [(dtype, True) for dtype in types], (
        f"contiguous master, float32 gradient and moments, not {[(x.dtype, x.stride()) for x in tensors]}"
    )
    if other is None:
        kind, other = "nothing", param
    assert other.shape == param.shape, f"{kind} is not like param"
    if param.numel() == 0:
        return
    if remainder is not None:
        param = param.view(torch.int16)
    adamw_update[(triton.cdiv(param.numel(), BLOCK),)](
        param, grad, exp_avg, exp_avg_sq, other, step, factor, applies, param.numel(),
        lr, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
        LOG2_BETA1=_log2(beta1), LOG2_BETA2=_log2(beta2), OTHER=kind, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
