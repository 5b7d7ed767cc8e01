"""Update rules on flat tensors. A rule names the tensors it keeps; the optimizer makes, shards and saves them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_aquila.kernels.adamw import adamw_
from megatron_aquila.optim.clip import Clip


class Rule(Protocol):
    """How weights follow from gradients."""

    state: ClassVar[tuple[str, ...]]  # names of the tensors it keeps, each as large as the weight and 0 at first

    def update_(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        *,
        lr: float,
        decays: bool,
        step: Tensor,
        clip: Clip,
        publish: Tensor | None = None,
        remainder: Tensor | None = None,
    ) -> None:
        """Change ``weight`` and ``state`` in place, by ``grad`` times ``clip.factor``; not where it is not finite.

        All are flat and of one size. ``step`` is 0-dim on the device; the first is 1. ``publish`` gets the new weight
        in its own type; with a ``remainder`` it is the weight, of which they are the missing bits. Waits for nothing.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """torch.optim.AdamW's rule. ``kernel`` computes it: ``kernels.adamw``'s reference, or a faster one."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    kernel: Callable[..., None] = adamw_

    def update_(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        *,
        lr: float,
        decays: bool,
        step: Tensor,
        clip: Clip,
        publish: Tensor | None = None,
        remainder: Tensor | None = None,
    ) -> None:
        """Local."""
        self.kernel(
            weight,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay if decays else 0.0,
            step=step,
            factor=clip.factor,
            applies=clip.applies,
            publish=publish,
            remainder=remainder,
        )


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Plain gradient descent without momentum: the rule under which parameters show gradient errors undistorted."""

    state: ClassVar[tuple[str, ...]] = ()

    weight_decay: float = 0.0

    def update_(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        *,
        lr: float,
        decays: bool,
        step: Tensor,
        clip: Clip,
        publish: Tensor | None = None,
        remainder: Tensor | None = None,
    ) -> None:
        """Local."""
        assert remainder is None, "SGD keeps masters in float32"
        shrunk = weight * (1 - lr * self.weight_decay) if decays else weight
        torch.where(clip.applies, shrunk.add(grad * clip.factor, alpha=-lr), weight, out=weight)
        if publish is not None:
            publish.copy_(weight)
