"""What two steps compute, as whole logical tensors, by the engine under any layout."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import Chunk, param_chunks, range_chunks
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.train.build import Machine, build_machine, context_pieces, create_context
from megatron_aquila.train.corpus import document_rules
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.resume import initialize
from megatron_aquila.train.step import agree, compute_gradients
from megatron_aquila.verify.outputs import recording
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.sample import rank_batches

Rule = Literal["sgd", "adamw"]
RULES: tuple[Rule, ...] = ("sgd", "adamw")
SOURCES = ("even", "odd")
PATIENCE = 300.0  # seconds, on a crowded machine; what hangs in a collective is ended by the group's own timeout


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything a layout may not change.

    Of a first step what the layers give, loss (all that is differentiated), gradients, their norm, and parameters after
    an update by each rule. Of a second over the same batch the loss, and after SGD the gradients: what was kept from
    the first must not show.
    """

    outputs: Mapping[str, Tensor]
    loss: float
    gradients: Mapping[str, Tensor]
    grad_norm: float
    updated: Mapping[Rule, Mapping[str, Tensor]]  # by update rule
    next_loss: Mapping[str, float]  # by update rule
    next_gradients: Mapping[str, Tensor]


def observe_layout(config: RunConfig, pool: WorkerPool) -> Observation:
    """Two steps of the real engine on ``pool``'s processes, split as ``config`` says."""
    return join_ranks(pool.run(observe_rank, config, timeout=PATIENCE))


def arranged(found: Observation, like: Observation) -> Observation:
    """``found`` with its tensors in the order of ``like``: ranks hand over theirs as their buckets lie."""

    def order(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in [*names, *tensors] if name in tensors}

    return replace(
        found,
        outputs=order(found.outputs, like.outputs),
        gradients=order(found.gradients, like.gradients),
        updated={rule: order(found.updated[rule], like.updated[rule]) for rule in RULES},
        next_gradients=order(found.next_gradients, like.next_gradients),
    )


@dataclass(frozen=True, kw_only=True)
class RankObservation:
    """One rank's share of an ``Observation``, as chunks of logical tensors."""

    outputs: list[Chunk]
    loss: float
    gradients: list[Chunk]
    grad_norm: float
    updated: dict[str, list[Chunk]]
    next_loss: dict[str, float]
    next_gradients: list[Chunk]


def join_ranks(parts: list[RankObservation]) -> Observation:
    """The ranks' shares as one."""
    first = parts[0]
    return Observation(
        outputs=assemble(chunk for part in parts for chunk in part.outputs),
        loss=first.loss,
        gradients=assemble(chunk for part in parts for chunk in part.gradients),
        grad_norm=first.grad_norm,
        updated={rule: assemble(chunk for part in parts for chunk in part.updated[rule]) for rule in RULES},
        next_loss=first.next_loss,
        next_gradients=assemble(chunk for part in parts for chunk in part.next_gradients),
    )


def observe_rank(config: RunConfig) -> RankObservation:
    """Two steps under each update rule on this rank. Collective over the world; runs in a worker."""
    by_sgd, by_adamw = (_observe_rule(replace(config, optim=replace(config.optim, optimizer=rule))) for rule in RULES)
    return replace(
        by_sgd,
        updated=by_sgd.updated | by_adamw.updated,
        next_loss=by_sgd.next_loss | by_adamw.next_loss,
    )


def build_small(config: RunConfig) -> Machine:
    """The machine of this process's world, with its weights filled from the seed. Collective."""
    parallel = config.parallel
    assert parallel.data is not None, "a small config names its data-parallel degree"
    derived = derive(config, parallel.tensor * parallel.context * parallel.pipeline * parallel.data)
    machine = build_machine(config, derived, create_context(config, derived, torch.device("cpu")))
    initialize(machine)
    return machine


def machine_batches(machine: Machine) -> list[Batch]:
    """This rank's microbatches of the proof's global batch, as the machine's settings split it and keep documents."""
    config = machine.config
    return rank_batches(
        machine.derived.shape,
        seed=config.seed,
        global_batch=config.train.global_batch,
        share=machine.derived.batches.share_of(machine.ctx.dp.rank),
        documents=document_rules(config.data, config.data.eod_token_id),
        pieces=context_pieces(config.parallel, machine.derived.shape, machine.ctx.cp),
    )


def _observe_rule(config: RunConfig) -> RankObservation:
    """A step, an update, and a second: trained under SGD, validated under AdamW, so that both ways are seen.

    Nobody waits for the parameters before the second forward: that they are there is the engine's to see to.
    """
    machine, rule = build_small(config), config.optim.optimizer
    optimizer, ctx, scale = machine.optimizer, machine.ctx, machine.scaling.initial
    batches = machine_batches(machine)
    first, second = _loss_sums(machine, batches), _loss_sums(machine, batches)
    with recording(machine) as outputs:
        compute_gradients(machine, batches, first)
    gradients = gradient_chunks(machine, scale=scale)
    clip = optimizer.clip(config.optim.clip_grad, loss_scale=scale)
    optimizer.step(config.optim.lr, clip)
    if rule == "sgd":
        compute_gradients(machine, batches, second)
    else:
        machine.engine(second.loss).evaluate(machine.forward_program(len(batches)), second.weigh(batches))
    return RankObservation(
        outputs=outputs,
        loss=first.means(ctx).differentiated,
        gradients=gradients,
        grad_norm=clip.norm.item(),
        updated={rule: current_weights(machine)},
        next_loss={rule: second.means(ctx).differentiated},
        next_gradients=gradient_chunks(machine, scale=scale) if rule == "sgd" else [],
    )


def _loss_sums(machine: Machine, batches: list[Batch]) -> LossSums:
    ctx, scale = machine.ctx, machine.scaling.initial
    num_tokens, has_z_loss = agree(ctx, batches).num_tokens, machine.derived.shape.max_z_loss > 0
    return LossSums(SOURCES, num_tokens=num_tokens, device=ctx.device, loss_scale=scale, has_z_loss=has_z_loss)


def gradient_chunks(machine: Machine, *, scale: float = 1.0) -> list[Chunk]:
    """This rank's rectangles of the reduced gradients, divided by the loss ``scale``."""
    return [
        replace(chunk, tensor=chunk.tensor / scale)
        for kind, owned, values in machine.optimizer.ranges()
        if kind == "grad"
        for chunk in range_chunks(owned, values)
    ]


def current_weights(machine: Machine) -> list[Chunk]:
    """Copies of this rank's rectangles of the weights. Communicates where they are sharded: one is read at a time."""
    found = list[Chunk]()
    for info in machine.infos:
        machine.optimizer.wait_for_weights([info.param])
        found += map(_copy, param_chunks(info))
    return found


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
