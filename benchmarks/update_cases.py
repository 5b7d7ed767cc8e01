"""The kernels' cases of the update: AdamW on wide and on narrow states, and the gradient norm."""

from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.case import Case, Cases, Kernel, Size, Work, draw
from megatron_aquila.kernels.adamw import adamw_
from megatron_aquila.kernels.remainder import join, split
from megatron_aquila.optim.clip import Clip, squared_norm
from megatron_aquila.plan.shape import ModelShape

MAX_NORM = 1.0


def _adamw(size: Size, device: torch.device, dtype: torch.dtype, *, is_narrow: bool = False) -> Case:
    """The update of a gate and up projection. Wide, all is float32; narrow, 12 bytes an element with its gradient."""
    del dtype  # an optimizer's own
    count = 2 * size.shape.ffn_size * size.shape.hidden_size
    master, grad, mean = (draw(device, torch.float32, count) for _ in range(3))
    square = draw(device, torch.float32, count).square()
    numbers = {"step": torch.tensor(3), "factor": torch.tensor(0.5, dtype=torch.float64), "applies": torch.tensor(True)}
    settings: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    settings |= {name: number.to(device) for name, number in numbers.items()}

    def call(kernel: Kernel, *tensors: Tensor) -> tuple[Tensor, ...]:
        weight, grad, *states = tensors
        kernel(weight, grad, *states[:2], **settings, remainder=states[2] if is_narrow else None)
        return weight, *states

    if not is_narrow:
        work = Work(7 * master.nbytes)  # four are read, three written
        return Case(op="adamw", reference=adamw_, inputs=(master, grad, mean, square), call=call, forward=work)
    weight, remainder = split(master)
    states = mean.bfloat16(), square.bfloat16(), remainder

    def exact() -> tuple[Tensor, ...]:
        wide = [x.double() for x in (master, grad, *states[:2])]
        adamw_(wide[0], wide[1], wide[2], wide[3], **settings)
        return wide[0], wide[2], wide[3]

    return Case(
        op="adamw",
        reference=adamw_,
        inputs=(weight, grad, *states),
        call=call,
        forward=Work(grad.nbytes + 2 * (weight.nbytes + sum(x.nbytes for x in states))),
        exact=exact,
        compared=lambda weight, mean, square, remainder: (join(weight, remainder), mean, square),
    )


def _grad_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    """Of a layer's gradients, which are float32 whatever the weights are; each byte is read once."""
    del dtype
    grads = tuple(draw(device, torch.float32, *sizes) for sizes in layer_weights(size.shape))

    def torch_clip(*grads: Tensor) -> Tensor:
        weights = [grad.new_empty(()).expand(grad.shape) for grad in grads]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        return clip_grad_norm_(weights, MAX_NORM)

    return Case(
        op="grad_norm",
        reference=lambda *grads: torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm(),
        inputs=grads,
        call=lambda kernel, *grads: (kernel(*grads),),
        forward=Work(sum(grad.nbytes for grad in grads)),
        kernels={
            "own": lambda: lambda *grads: Clip.at(squared_norm(grads, device).sqrt(), MAX_NORM).norm,
            "torch's clip_grad_norm_, which also multiplies": lambda: torch_clip,
        },
    )


def layer_weights(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """Sizes of the matrices of a layer."""
    return (
        (shape.attention_size + 2 * shape.kv_size, shape.hidden_size),
        (shape.hidden_size, shape.attention_size),
        (2 * shape.ffn_size, shape.hidden_size),
        (shape.hidden_size, shape.ffn_size),
    )


UPDATE_CASES: Cases = MappingProxyType(
    {"adamw": _adamw, "adamw, 12 bytes": partial(_adamw, is_narrow=True), "grad_norm": _grad_norm}
)
