"""One optimizer step: the top of the machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_aquila.data.loader import BatchLoader
from megatron_aquila.errors import AquilaError, DataError
from megatron_aquila.observe.profile import OPTIMIZER
from megatron_aquila.observe.report import StepReport
from megatron_aquila.optim.clip import Clip
from megatron_aquila.optim.scaler import LossScaling
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.env import memory_bytes
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.readback import Moment, Readback
from megatron_aquila.train.spikes import Limits, finite, limits, remembered
from megatron_aquila.train.state import TrainState


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of a step, once the device has told: the state after it, and its row of the log.

    ``report`` is None of a step that had nothing to train on. ``is_spike`` as ``spikes.limits`` say.
    """

    state: TrainState
    report: StepReport | None
    is_finite: bool = True
    is_spike: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step that was launched: the device may still be at work on it.

    ``state`` is the one after it but for what only the device knows. ``told`` is None where the step had nothing to
    train on.
    """

    state: TrainState
    samples: tuple[int, int]
    told: "Told | None"

    def outcome(self, state: TrainState, scaling: LossScaling) -> StepOutcome:
        """Settle the step in ``state``, which may be a later one's. Waits until the figures are here. Local."""
        if self.told is None:
            return StepOutcome(state.without((self.samples,)), None)
        *total, norm, is_finite, is_spike, applies = self.told.figures.read()
        means = self.told.sums.means_of(total)
        report = self.told.report(
            loss=means.loss,
            source_loss=means.by_source,
            z_loss=means.z_loss,
            grad_norm=norm,
            applied=applies != 0,
            seconds=self.told.figures.sent.seconds_since(self.told.began),
        )
        loss_scale = scaling.after(state.loss_scale, found_inf=is_finite == 0)
        state = state.settled(self.samples, applied=applies != 0, loss_scale=loss_scale)
        figures = finite(report.step, report.loss, report.grad_norm)
        if figures is not None:
            state = state.remembering(figures, window=self.told.remembered)
        return StepOutcome(state, report, is_finite != 0, is_spike != 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What the device tells of a step: the loss sums, the gradient norm, and whether they are finite, a spike, and
    applied. ``remembered``: of how many steps the figures are kept.
    """

    began: Moment
    figures: Readback
    sums: LossSums
    report: Callable[..., StepReport]  # what is known of the step, but for the figures
    remembered: int


def train_step(machine: Machine, corpus: Corpus, state: TrainState, *, stop_requested: bool) -> Step | None:
    """Read, forward, backward, reduce, clip, update: one global batch. Communicates over every group.

    None, on every rank, where any of them wants to stop: the step has not begun.

    Waits for the loader and for what the hosts agree on, never for the device. The learning rate is that of the samples
    consumed before the step, as in Megatron-LM. A step is not applied where its loss or gradient norm is not finite,
    or, unless spikes are only warned of, a spike: the device decides that, from figures that are equal on all ranks.
    Its samples count as consumed and it does not count for Adam's bias correction. In fp16 it may lower the loss scale.
    Where no label is left to train on, as where all samples are left out, nothing is computed.
    """
    ctx, train, scale = machine.ctx, machine.config.train, state.loss_scale.scale
    began, reading = Moment(ctx.device), time.perf_counter()
    global_batch, _ = machine.derived.batch_at(state.consumed_samples)
    batches, failure = read_batches(corpus.train, state.consumed_samples, global_batch)
    data_seconds = time.perf_counter() - reading

    counts = agree(ctx, batches, stop_requested=stop_requested, failed=failure is not None)
    if counts.failed:
        raise failure if failure is not None else elsewhere_failed()
    if counts.stop_requested:
        return None
    computed_tokens = global_batch * machine.derived.shape.seq_len
    after = state.moved_on(samples=global_batch, tokens=computed_tokens if counts.num_tokens > 0 else 0)
    samples = (state.consumed_samples, after.consumed_samples)
    if counts.num_tokens == 0:
        return Step(state=after, samples=samples, told=None)
    sums = LossSums(
        corpus.source_names,
        num_tokens=counts.num_tokens,
        device=ctx.device,
        loss_scale=scale,
        has_z_loss=machine.derived.shape.max_z_loss > 0,
    )
    compute_gradients(machine, [batch.to(ctx.device) for batch in batches], sums)
    total, lr = sums.total(ctx), machine.lr.at(state.consumed_samples)
    with record_function(OPTIMIZER):
        clip = machine.optimizer.clip(machine.config.optim.clip_grad, loss_scale=scale)
        judged = judge(clip, sums, total, limits(train, state), refuses_spikes=train.on_spike != "warn")
        machine.optimizer.step(lr, judged.clip)
    report = partial(
        StepReport,
        step=after.step,
        consumed_samples=after.consumed_samples,
        global_batch=global_batch,
        num_tokens=counts.num_tokens,
        computed_tokens=computed_tokens,
        lr=lr,
        attention_share=counts.attended / (computed_tokens * machine.derived.shape.seq_len),
        loss_scale=scale,
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(ctx.device),
    )
    told = Told(began=began, figures=Readback(judged.figures), sums=sums, report=report, remembered=remembered(train))
    return Step(state=after, samples=samples, told=told)


@dataclass(frozen=True, slots=True)
class Judged:
    """How a step's gradients are to be used, and all that is to be told of it, a float64 vector on the device."""

    clip: Clip
    figures: Tensor


def judge(clip: Clip, sums: LossSums, total: Tensor, bounds: Limits, *, refuses_spikes: bool) -> Judged:
    """Whether a step is applied: not where it is not finite, and, with ``refuses_spikes``, where it is a spike. Local.

    ``total`` and the norm were summed over all ranks: what is decided of them on one is decided on all.
    """
    is_finite = clip.applies & total.isfinite().all()
    is_spike = (clip.norm > bounds.grad_norm) | (sums.loss_sum(total) > bounds.loss * sums.num_tokens)
    applies = is_finite & ~is_spike if refuses_spikes else is_finite
    marks = torch.stack([clip.norm, *(mark.to(clip.norm.dtype) for mark in (is_finite, is_spike, applies))])
    return Judged(replace(clip, applies=applies), torch.cat([total, marks]))


def compute_gradients(machine: Machine, batches: Sequence[Batch], sums: LossSums) -> None:
    """Forward and backward over this rank's microbatches, and the reduction: gradients are ready to be clipped.

    As ``machine.runner`` does it. ``sums`` are empty before.
    """
    machine.runner(partial(forward_backward, machine), batches, sums)


def forward_backward(machine: Machine, batches: Sequence[Batch], sums: LossSums) -> None:
    """What ``compute_gradients`` runs. It reads nothing that changes from step to step but ``batches`` and ``sums``."""
    machine.optimizer.begin_step(len(batches))
    machine.engine(sums.loss).step(machine.programs[len(batches)], sums.weigh(batches))
    machine.optimizer.reduce_gradients()


def read_batches(loader: BatchLoader[Batch], consumed: int, global_batch: int) -> tuple[list[Batch], DataError | None]:
    """This rank's microbatches, or none and why: a rank must not leave while the others go on into a collective."""
    try:
        return loader.fetch(consumed, global_batch), None
    except DataError as error:
        return [], error


def elsewhere_failed() -> AquilaError:
    """What the ranks raise whose own batch was fine."""
    error = AquilaError("another rank could not read its part of the batch; it says why")
    error.is_shared = True
    return error


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know before the first forward of a step."""

    num_tokens: int
    attended: int  # the sum of all documents' squared lengths
    stop_requested: bool
    failed: bool


def agree(
    ctx: ParallelContext, batches: Sequence[Batch], *, stop_requested: bool = False, failed: bool = False
) -> Agreement:
    """Count the labels of the global batch; ask whether any rank wants to stop or has failed.

    ``batches`` are on the host, and so is what the ranks say: one all-reduce over all of them that waits for no GPU,
    which may still be at work on the step before. The ranks of a tp or pp group hold the same tokens: only the first
    of each counts them. Those of a cp group hold parts of the same samples, whose lengths the first one counts.
    """
    counts_here = ctx.tp.rank == 0 and ctx.pp.rank == 0
    counts = torch.zeros(4, dtype=torch.float64)
    if counts_here:
        for batch in batches:
            counts[0] += batch.loss_mask_BS.sum(dtype=torch.float64)
            counts[1] += attended(batch, cp=ctx.cp.size) * (ctx.cp.rank == 0)
    counts[2:] = torch.tensor([stop_requested, failed])
    num_tokens, pairs, stops, failures = all_reduce_(counts, ctx.host_world).tolist()
    return Agreement(num_tokens=round(num_tokens), attended=round(pairs), stop_requested=stops > 0, failed=failures > 0)


def attended(batch: Batch, *, cp: int) -> int:
    """The sum of the squared lengths of what attention works on, on ``cp`` ranks: twice its pairs of tokens."""
    if batch.documents is None:
        return batch.tokens_BS.shape[0] * (batch.tokens_BS.shape[1] * cp) ** 2
    return sum(length**2 for length in batch.documents.lengths)
