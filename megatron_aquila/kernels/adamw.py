"""One AdamW update of a flat tensor, in place: torch.optim.AdamW's formula.

What a step knows only on the device stays there, in 0-dim tensors: ``step`` counts the updates, this one included;
``factor`` is what the gradient is multiplied with as it is read; where ``applies`` is False nothing changes. No kernel
waits for them.

Moments may be bfloat16, and a bfloat16 ``param`` with a ``remainder`` stands for a float32 one (``kernels.remainder``);
what is computed is the same, in the gradient's type, and rounded where it is stored.
"""

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_aquila.kernels.remainder import join, split

BLOCK = 2**18  # elements at a time on a CPU: what one operation leaves in a CPU's cache the next one finds there
WIDENED = 2**24  # elements at a time for kernels that get copies of what is not float32


def adamw_(
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
    publish: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq``; all four are flat and of one size.

    ``publish``, where given, gets the new ``param`` rounded to its own type: the 16-bit weights of a float32 master.
    Element by element, so that the result does not depend on how a parameter is split. Decay is decoupled: ``param``
    first shrinks by ``lr * weight_decay``. On a GPU some five tensors of the size of ``param`` are made meanwhile: no
    run takes it there unless it is asked to.
    """
    count = step.double()
    rate = torch.full_like(count, -lr) / (1 - beta1**count)  # a float divided by a tensor would be rounded twice
    correction = (1 - beta2**count).sqrt()
    # A GPU gets the whole: launches cost more there, and torch.compile would copy all of it for each block's writes.
    size = max(1, param.numel()) if param.device.type == "cuda" else BLOCK
    for master, g, mean, square in _opened(size, param, grad, exp_avg, exp_avg_sq, remainder):
        g = g * factor
        new_mean = mean.lerp(g, 1 - beta1)
        new_square = (square * beta2).addcmul_(g, g, value=1 - beta2)
        change = (new_mean * rate).div_(new_square.sqrt().div_(correction).add_(eps))
        new_master = (master * (1 - lr * weight_decay)).add_(change)
        for old, new in ((master, new_master), (mean, new_mean), (square, new_square)):
            torch.where(applies, new, old, out=old)
    _publish(param, publish)


def adamw_torch_(
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
    publish: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    """``adamw_`` by torch's fused kernel: two passes over memory, not fifteen. Roundings differ in the last bit.

    On a CPU the last elements of a tensor are rounded unlike the others, so that a split shows, unless it is at a
    multiple of 64 elements, as the borders of optimizer shards are. The kernel's own ``grad_scale`` is float32,
    divides, and is written back into the gradient: multiplied here instead.
    """
    count, found_inf = step.float(), (~applies).float()
    for weight, g, mean, square in _opened(WIDENED, param, grad, exp_avg, exp_avg_sq, remainder):
        torch._fused_adamw_(
            [weight],
            [g * factor],
            [mean],
            [square],
            [],
            [count],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
    _publish(param, publish)


def adamw_native_(
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
    publish: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    """``adamw_`` by our C++ extension, in one pass; for a CPU, with gradients in float32. A split changes no bit.

    Roundings differ from the reference's in the last bit, where torch contracts a product and a sum.
    """
    from megatron_aquila._native import adamw

    if bool(applies):
        count = int(step)
        scalars = {
            "factor": float(factor),
            "decay": 1 - lr * weight_decay,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "rate": -lr / (1 - beta1**count),
            "correction": (1 - beta2**count) ** 0.5,
            "eps": eps,
        }
        for tensors in _opened(WIDENED, param, grad, exp_avg, exp_avg_sq, remainder):
            adamw(*(x.numpy() for x in tensors), **scalars, threads=torch.get_num_threads())
    _publish(param, publish)


def adamw_apex_(
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
    publish: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    """``adamw_`` by the kernel behind NVIDIA apex's FusedAdam with ``capturable``; float32 on a GPU only.

    It leaves the multiplied gradient in ``grad``.
    """
    from apex.multi_tensor_apply import multi_tensor_applier

    rate, noop, count = torch.full_like(factor, lr).float(), (~applies).int(), step.int()
    decoupled, bias_correction = 1, 1
    for weight, g, mean, square in _opened(WIDENED, param, grad, exp_avg, exp_avg_sq, remainder):
        multi_tensor_applier(
            importlib.import_module("amp_C").multi_tensor_adam_capturable,
            noop,
            [[g], [weight], [mean], [square]],
            rate,
            beta1,
            beta2,
            eps,
            count,
            decoupled,
            bias_correction,
            weight_decay,
            factor.float(),
        )
    _publish(param, publish)


def adamw_triton_(
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
    publish: Tensor | None = None,
    remainder: Tensor | None = None,
) -> None:
    """``adamw_`` by our Triton kernel, in one pass; gradients in float32 only. A split changes no bit."""
    from megatron_aquila.kernels.triton.adamw import update_

    update_(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        factor=factor,
        applies=applies,
        publish=publish,
        remainder=remainder,
    )


def _publish(param: Tensor, publish: Tensor | None) -> None:
    if publish is not None:
        publish.copy_(param)


def _opened(
    size: int, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, remainder: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of ``size`` elements of master, gradient and moments, all in the gradient's type, to be changed in place.

    What is kept in another way is a copy, and stored behind each turn of the loop: bit by bit where nothing changed.
    """
    for start in range(0, param.numel(), size):
        weight, g, mean, square = (x[start : start + size] for x in (param, grad, exp_avg, exp_avg_sq))
        rest = None if remainder is None else remainder[start : start + size]
        master = weight if rest is None else join(weight, rest)
        wide = mean.to(g.dtype), square.to(g.dtype)  # no copies if the type is the same
        yield master, g, *wide
        if rest is not None:
            for kept, half in zip((weight, rest), split(master), strict=True):
                kept.copy_(half)
        for kept, moment in zip((mean, square), wide, strict=True):
            if kept.dtype is not moment.dtype:
                kept.copy_(moment)
