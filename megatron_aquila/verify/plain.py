"""What two steps compute by the plain reference, on one process."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.observe import RULES, Observation
from megatron_aquila.verify.reference import (
    Weights,
    plain_documents,
    plain_losses,
    plain_losses_alone,
    plain_positions,
)
from megatron_aquila.verify.sample import sample_batch
from megatron_aquila.verify.shrink import EOD

Losses = Callable[[Weights, dict[str, Tensor]], Tensor]  # weights, and where to leave outputs -> loss_BS


def observe_plain(config: RunConfig, weights: Weights, shape: ModelShape, *, alone: bool = False) -> Observation:
    """What the plain reference gives for the settings' batch, in the weights' dtype. Local.

    What ends of documents mean is worked out from the tokens here, not by the loader's rules. ``alone``: every document
    is a sample of its own, so that nothing needs a mask; layers' outputs are then not observed.
    """
    batch = sample_batch(shape, range(config.train.global_batch), seed=config.seed)
    data, tokens = config.data, batch.tokens_BS
    documents = plain_documents(tokens, EOD)
    positions = plain_positions(documents if data.reset_position_ids else torch.zeros_like(documents))
    attended = documents if data.reset_attention_mask else None
    mask = batch.loss_mask_BS * (tokens != EOD) if data.eod_mask_loss else batch.loss_mask_BS

    def losses(leaves: Weights, outputs: dict[str, Tensor]) -> Tensor:
        if alone:
            return plain_losses_alone(leaves, shape, tokens, batch.labels_BS, documents)
        return plain_losses(leaves, shape, tokens, batch.labels_BS, positions, attended, outputs)

    first = plain_pass(weights, losses, mask)
    updated = {rule: plain_update(config.optim, rule, weights, first) for rule in RULES}
    then = {rule: plain_pass(updated[rule], losses, mask) for rule in RULES}
    return Observation(
        outputs=first.outputs,
        loss=first.loss,
        gradients=first.gradients,
        grad_norm=first.norm,
        updated=updated,
        next_loss={rule: then[rule].loss for rule in RULES},
        next_gradients=then["sgd"].gradients,
    )


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward over the whole batch."""

    outputs: Mapping[str, Tensor]
    loss: float
    gradients: Mapping[str, Tensor]
    norm: float


def plain_pass(weights: Weights, losses: Losses, mask_BS: Tensor) -> Pass:
    """Loss, outputs and gradients at ``weights``."""
    outputs: dict[str, Tensor] = {}
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss_BS = losses(leaves, outputs)
    mask_BS = mask_BS.to(loss_BS.dtype)
    loss = (loss_BS * mask_BS).sum() / mask_BS.sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    return Pass({name: output.detach() for name, output in outputs.items()}, loss.item(), gradients, norm)


def plain_update(optim: OptimConfig, rule: str, weights: Weights, found: Pass) -> dict[str, Tensor]:
    """The weights after one clipped step of torch's own optimizer; 1-D tensors do not decay."""
    scale = min(1.0, optim.clip_grad / (found.norm + 1e-6)) if optim.clip_grad > 0 else 1.0
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    for name, param in params.items():
        param.grad = found.gradients[name] * scale
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if rule == "adamw":
        torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps).step()
    else:
        torch.optim.SGD(groups, lr=optim.lr).step()
    return {name: param.detach() for name, param in params.items()}
