"""One optimizer step: the top of the machine."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_aquila.observe.report import StepReport
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.build import Machine, load_batches
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.env import memory_bytes
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.state import TrainState


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The state after a step, its row of the log, and whether any rank had asked to stop before it."""

    state: TrainState
    report: StepReport
    stop_requested: bool


def train_step(machine: Machine, corpus: Corpus, state: TrainState, *, stop_requested: bool) -> StepOutcome:
    """Read, forward, backward, reduce, clip, update: one global batch. Communicates over every group.

    The learning rate is that of the samples consumed before the step, as in Megatron-LM. A step whose gradient norm is
    not finite is not applied; its samples count as consumed and it does not count for Adam's bias correction.
    """
    started = time.perf_counter()
    ctx, derived = machine.ctx, machine.derived
    global_batch, _ = derived.batch_at(state.consumed_samples)
    batches = load_batches(corpus.train, state.consumed_samples, global_batch, ctx.device)
    data_seconds = time.perf_counter() - started

    counts = agree(ctx, batches, stop_requested=stop_requested)
    sums = LossSums(corpus.source_names, num_tokens=counts.num_tokens, device=ctx.device)
    compute_gradients(machine, batches, sums)
    grad_norm = machine.optimizer.clip_(machine.config.optim.clip_grad)
    lr = machine.lr.at(state.consumed_samples)
    applied = math.isfinite(grad_norm)
    if applied:
        machine.optimizer.step(lr)

    means = sums.means(ctx)
    computed_tokens = global_batch * derived.shape.seq_len
    state = state.advance(samples=global_batch, tokens=computed_tokens, applied=applied)
    report = StepReport(
        step=state.step,
        consumed_samples=state.consumed_samples,
        global_batch=global_batch,
        num_tokens=counts.num_tokens,
        computed_tokens=computed_tokens,
        loss=means.loss,
        grad_norm=grad_norm,
        lr=lr,
        applied=applied,
        seconds=time.perf_counter() - started,
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(ctx.device),
        source_loss=means.by_source,
    )
    return StepOutcome(state, report, counts.stop_requested)


def compute_gradients(machine: Machine, batches: Sequence[Batch], sums: LossSums) -> None:
    """Forward and backward over this rank's microbatches, then the reduction: gradients are ready to be clipped."""
    machine.optimizer.zero_grad()
    machine.engine(sums.loss).step(machine.program(len(batches)), batches)
    machine.optimizer.reduce_gradients()


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know before the first forward of a step."""

    num_tokens: int
    stop_requested: bool


def agree(ctx: ParallelContext, batches: Sequence[Batch], *, stop_requested: bool) -> Agreement:
    """Count the labels of the whole global batch and ask whether any rank wants to stop. One all-reduce over the world.

    The ranks of a tp or pp group hold the same microbatches: only the first of each counts them.
    """
    counts_here = ctx.tp.rank == 0 and ctx.pp.rank == 0
    tokens = torch.stack([batch.loss_mask_BS.sum(dtype=torch.float64) for batch in batches]).sum()
    stop = torch.tensor(float(stop_requested), dtype=torch.float64, device=ctx.device)
    num_tokens, stops = all_reduce_(torch.stack([tokens * counts_here, stop]), ctx.world).tolist()
    return Agreement(num_tokens=round(num_tokens), stop_requested=stops > 0)
