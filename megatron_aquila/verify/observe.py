"""What a step computes, as whole logical tensors: by the plain reference, and by the engine under any layout."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import Chunk, param_chunks, range_chunks
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import OptimConfig, RunConfig
from megatron_aquila.model.init import initialize_
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.train.build import Machine, build_machine, create_context
from megatron_aquila.train.corpus import document_rules
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import agree, compute_gradients
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.reference import plain_documents, plain_losses, plain_losses_alone, plain_positions
from megatron_aquila.verify.sample import rank_batches, sample_batch
from megatron_aquila.verify.shrink import EOD

RULES: tuple[Literal["sgd", "adamw"], ...] = ("sgd", "adamw")
SOURCES = ("even", "odd")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything a layout may not change: loss, gradient norm, gradients, and parameters after one update."""

    loss: float
    grad_norm: float
    gradients: Mapping[str, Tensor]
    updated: Mapping[str, Mapping[str, Tensor]]  # by update rule


def observe_plain(
    config: RunConfig, weights: Mapping[str, Tensor], shape: ModelShape, *, alone: bool = False
) -> Observation:
    """One step of the plain reference on one process, in the weights' dtype. Local.

    What ends of documents mean is worked out from the tokens here, not by the loader's rules. ``alone``: every document
    is a sample of its own, so that nothing needs a mask.
    """
    batch = sample_batch(shape, range(config.train.global_batch), seed=config.seed)
    data, tokens = config.data, batch.tokens_BS
    documents = plain_documents(tokens, EOD)
    positions = plain_positions(documents if data.reset_position_ids else torch.zeros_like(documents))
    attended = documents if data.reset_attention_mask else None
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    if alone:
        losses = plain_losses_alone(leaves, shape, tokens, batch.labels_BS, documents)
    else:
        losses = plain_losses(leaves, shape, tokens, batch.labels_BS, positions, attended)
    counted = batch.loss_mask_BS * (tokens != EOD) if data.eod_mask_loss else batch.loss_mask_BS
    mask = counted.to(losses.dtype)
    loss = (losses * mask).sum() / mask.sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    updated: dict[str, dict[str, Tensor]] = {
        rule: plain_update(config.optim, rule, weights, gradients, norm) for rule in RULES
    }
    return Observation(loss=loss.item(), grad_norm=norm, gradients=gradients, updated=updated)


def plain_update(
    optim: OptimConfig, rule: str, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], norm: float
) -> dict[str, Tensor]:
    """The weights after one clipped step of torch's own optimizer; 1-D tensors do not decay."""
    scale = min(1.0, optim.clip_grad / (norm + 1e-6)) if optim.clip_grad > 0 else 1.0
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    for name, param in params.items():
        param.grad = gradients[name] * scale
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if rule == "adamw":
        torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps).step()
    else:
        torch.optim.SGD(groups, lr=optim.lr).step()
    return {name: param.detach() for name, param in params.items()}


def observe_layout(config: RunConfig, pool: WorkerPool) -> Observation:
    """One step of the real engine on ``pool``'s processes, split as ``config`` says."""
    parts = pool.run(observe_rank, config)
    return Observation(
        loss=parts[0].loss,
        grad_norm=parts[0].grad_norm,
        gradients=assemble(chunk for part in parts for chunk in part.gradients),
        updated={rule: assemble(chunk for part in parts for chunk in part.updated[rule]) for rule in RULES},
    )


@dataclass(frozen=True, kw_only=True)
class RankObservation:
    """One rank's share of an ``Observation``, as chunks of logical tensors."""

    loss: float
    grad_norm: float
    gradients: list[Chunk]
    updated: dict[str, list[Chunk]]


def observe_rank(config: RunConfig) -> RankObservation:
    """One step under each update rule on this rank. Collective over the world; runs in a worker."""
    first: RankObservation | None = None
    updated: dict[str, list[Chunk]] = {}
    for rule in RULES:
        optim = replace(config.optim, optimizer=rule, lr_warmup_samples=0)
        machine = build_small(replace(config, optim=optim))
        observed = _one_step(machine)
        updated[rule] = [_copy(chunk) for info in machine.infos for chunk in param_chunks(info)]
        first = observed if first is None else first
    assert first is not None, "at least one update rule"
    return replace(first, updated=updated)


def build_small(config: RunConfig) -> Machine:
    """The machine of this process's world, with its weights filled from the seed. Collective."""
    parallel = config.parallel
    assert parallel.data is not None, "a small config names its data-parallel degree"
    derived = derive(config, parallel.tensor * parallel.pipeline * parallel.data)
    machine = build_machine(config, derived, create_context(config, derived, torch.device("cpu")))
    initialize_(machine.infos, seed=config.seed)
    machine.optimizer.refresh_masters()
    return machine


def _one_step(machine: Machine) -> RankObservation:
    config, ctx, scale = machine.config, machine.ctx, machine.scaling.initial
    batches = rank_batches(
        machine.derived.shape,
        seed=config.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp=ctx.dp.size,
        dp_rank=ctx.dp.rank,
        documents=document_rules(config.data, config.data.eod_token_id),
    )
    counts = agree(ctx, batches)
    sums = LossSums(SOURCES, num_tokens=counts.num_tokens, device=ctx.device, loss_scale=scale)
    compute_gradients(machine, batches, sums)
    gradients = [replace(chunk, tensor=chunk.tensor / scale) for chunk in gradient_chunks(machine)]
    norm = machine.optimizer.clip_(config.optim.clip_grad, loss_scale=scale)
    machine.optimizer.step(config.optim.lr)
    return RankObservation(loss=sums.means(ctx).loss, grad_norm=norm, gradients=gradients, updated={})


def gradient_chunks(machine: Machine) -> list[Chunk]:
    """This rank's rectangles of the reduced gradients. Views, not copies."""
    return [
        chunk
        for kind, owned, values in machine.optimizer.ranges()
        if kind == "grad"
        for chunk in range_chunks(owned, values)
    ]


def _copy(chunk: Chunk) -> Chunk:
    return replace(chunk, tensor=chunk.tensor.detach().clone())


def assemble(chunks: Iterable[Chunk]) -> dict[str, Tensor]:
    """Whole logical tensors from the rectangles of all ranks.

    What no rank holds, and what two ranks hold differently, is NaN and so fails every check.
    """
    whole: dict[str, Tensor] = {}
    for chunk in chunks:
        if chunk.name not in whole:
            whole[chunk.name] = torch.full(chunk.global_shape, torch.nan, dtype=chunk.tensor.dtype)
        everything = Rectangle((0,) * len(chunk.global_shape), chunk.global_shape)
        place = whole[chunk.name][chunk.rectangle.within(everything)]
        conflict = ~place.isnan() & (place != chunk.tensor)
        place.copy_(chunk.tensor.masked_fill(conflict, torch.nan))
    return whole
