"""One AdamW update of a flat tensor, in place: torch.optim.AdamW's formula."""

import importlib

import torch
from torch import Tensor
from torch.optim.adamw import adamw


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
    step: int,
    publish: Tensor | None = None,
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq``; all four are alike in shape and type.

    ``publish``, where given, gets the new ``param`` rounded to its own type: the 16-bit weights of a float32 master.
    ``step`` counts updates, this one included: the first is 1. Element by element, so that the result does not depend
    on how a parameter is split. Decay is decoupled: ``param`` first shrinks by ``lr * weight_decay``.
    """
    assert step >= 1, f"the first update is step 1, not {step}"
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
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
    step: int,
    publish: Tensor | None = None,
) -> None:
    """``adamw_`` by torch's fused kernel: one pass over memory instead of ten. Roundings differ in the last bit.

    For GPUs. On a CPU the last elements of a tensor are rounded unlike the others, so that a split would show.
    """
    assert step >= 1, f"the first update is step 1, not {step}"
    before = torch.tensor(float(step - 1), device=param.device)  # the kernel counts it up itself
    adamw(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [before],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
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
    step: int,
    publish: Tensor | None = None,
) -> None:
    """``adamw_`` by the kernel behind NVIDIA apex's FusedAdam; float32 on a GPU only."""
    from apex.multi_tensor_apply import multi_tensor_applier

    assert step >= 1, f"the first update is step 1, not {step}"
    overflow = torch.zeros(1, dtype=torch.int, device=param.device)  # asked for by the kernel, never set by Adam
    tensors = [[grad], [param], [exp_avg], [exp_avg_sq]]
    decoupled, bias_correction = 1, 1
    multi_tensor_applier(
        importlib.import_module("amp_C").multi_tensor_adam,
        overflow,
        tensors,
        lr,
        beta1,
        beta2,
        eps,
        step,
        decoupled,
        bias_correction,
        weight_decay,
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
    step: int,
    publish: Tensor | None = None,
) -> None:
    """``adamw_`` by our Triton kernel, ``publish`` in the same pass; float32 only. A split changes no bit."""
    from megatron_aquila.kernels.triton.adamw import update_

    assert step >= 1, f"the first update is step 1, not {step}"
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
        publish=publish,
    )


def _publish(param: Tensor, publish: Tensor | None) -> None:
    if publish is not None:
        publish.copy_(param)
