"""One AdamW update of a flat tensor, in place: torch.optim.AdamW's formula.

What a step knows only on the device stays there, in 0-dim tensors: ``step`` counts the updates up to this one (first
1), ``factor`` is what the gradient is multiplied with as it is read, and where ``applies`` is False nothing changes.
No kernel waits for them.
"""

import importlib

import torch
from torch import Tensor

BLOCK = 2**18  # elements at a time: what one operation leaves in a CPU's cache the next one finds there


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
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq``; all four are flat and alike in size and type.

    ``publish``, where given, gets the new ``param`` rounded to its own type: the 16-bit weights of a float32 master.
    Element by element, so that the result does not depend on how a parameter is split. Decay is decoupled: ``param``
    first shrinks by ``lr * weight_decay``.
    """
    count = step.double()
    rate = torch.full_like(count, -lr) / (1 - beta1**count)  # a float divided by a tensor would be rounded twice
    correction = (1 - beta2**count).sqrt()
    blocks = (x.split(BLOCK) for x in (param, grad, exp_avg, exp_avg_sq))
    for old_weight, g, old_mean, old_square in zip(*blocks, strict=True):
        g = g * factor
        mean = old_mean.lerp(g, 1 - beta1)
        square = (old_square * beta2).addcmul_(g, g, value=1 - beta2)
        change = (mean * rate).div_(square.sqrt().div_(correction).add_(eps))
        weight = (old_weight * (1 - lr * weight_decay)).add_(change)
        for old, new in ((old_weight, weight), (old_mean, mean), (old_square, square)):
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
) -> None:
    """``adamw_`` by torch's fused kernel: two passes over memory, not fifteen. Roundings differ in the last bit.

    For GPUs. On a CPU the last elements of a tensor are rounded unlike the others, so that a split would show. The
    kernel's own ``grad_scale`` is float32, divides, and is written back into the gradient: multiplied here instead.
    """
    torch._fused_adamw_(
        [param],
        [grad * factor],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step.float()],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=(~applies).float(),
    )
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
) -> None:
    """``adamw_`` by the kernel behind NVIDIA apex's FusedAdam with ``capturable``; float32 on a GPU only.

    It leaves the multiplied gradient in ``grad``.
    """
    from apex.multi_tensor_apply import multi_tensor_applier

    decoupled, bias_correction = 1, 1
    multi_tensor_applier(
        importlib.import_module("amp_C").multi_tensor_adam_capturable,
        (~applies).int(),
        [[grad], [param], [exp_avg], [exp_avg_sq]],
        torch.full((), lr, dtype=torch.float32, device=param.device),
        beta1,
        beta2,
        eps,
        step.int(),
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
) -> None:
    """``adamw_`` by our Triton kernel, ``publish`` in the same pass; float32 only. A split changes no bit."""
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
    )


def _publish(param: Tensor, publish: Tensor | None) -> None:
    if publish is not None:
        publish.copy_(param)
