"""Bugs that parity must find: one table. Each is put into the workers that run it, and taken out again.

``python -m tests.verify.mutants PAGE`` writes the table into a page.
"""

import itertools
import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.optim.clip import Clip
from megatron_aquila.parallel.collectives import Pending
from megatron_aquila.train import build
from megatron_aquila.verify import observe
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.observe import Observation, RankObservation
from megatron_aquila.verify.page import markdown, put, write
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.rows import Claim, claims
from megatron_aquila.verify.shrink import LOSS_CHUNK, SCORE_CLAMP
from tests.families import AQUILA, BAICHUAN_7B, BAICHUAN_13B, TWO_RANGE

Inject = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug: what it is in words, how to inject it, the layout that shows it, the row it turns red and the tensor that
    is named. ``documents``: what the samples' documents are to each other, as switches of the data's settings.
    ``model``: settings of the model.
    """

    bug: str
    inject: Inject
    layout: Layout
    axis: str
    tensor: str
    documents: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def claim(self) -> Claim:
        """The row that must be red."""
        return next(claim for claim in claims(self.layout) if claim.axis == self.axis)


MUTANTS: dict[str, Mutant] = {}


def mutant(
    bug: str, layout: Layout, axis: str, tensor: str, *documents: str, model: Mapping[str, Any] | None = None
) -> Callable[[Inject], Inject]:
    """Put the decorated injection into the table."""

    def register(inject: Inject) -> Inject:
        MUTANTS[inject.__name__] = Mutant(
            bug=bug, inject=inject, layout=layout, axis=axis, tensor=tensor, documents=documents, model=model or {}
        )
        return inject

    return register


def observe_mutant(config: RunConfig, name: str) -> RankObservation:
    """Runs in a worker."""
    with MUTANTS[name].inject():
        return observe.observe_rank(config)


def run_mutant(name: str) -> Callable[[RunConfig, WorkerPool], Observation]:
    """The engine with the bug in it, as ``Parity`` wants it."""
    return lambda config, pool: observe.join_ranks(pool.run(observe_mutant, config, name))


def with_switches(config: RunConfig, switches: tuple[str, ...]) -> RunConfig:
    """``config`` with these switches of documents on."""
    return replace(config, data=replace(config.data, **dict.fromkeys(switches, True)))


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def within(owner: Any, name: str, patch: Callable[[], Any]) -> Any:
    """Patches only while the method ``owner.name`` runs."""
    right = getattr(owner, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        with patch():
            return right(*args, **kwargs)

    return patched(owner, name, staticmethod(wrong) if isinstance(owner.__dict__[name], staticmethod) else wrong)


@contextmanager
def both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


def other_attention(wrong: Callable[..., torch.Tensor]) -> Any:
    """Attention is ``wrong(attention, q, k, v, documents)``."""
    right = build.choose_kernels

    def choose(*args: Any, **kwargs: Any) -> Any:
        kernels = right(*args, **kwargs)
        return replace(kernels, attention=partial(wrong, kernels.attention))

    return patched(build, "choose_kernels", choose)


def unreduced(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x


ONE, TP, SP, PP, DP = Layout(), Layout(tp=2), Layout(tp=2, sequence=True), Layout(pp=2), Layout(dp=2)
OVERLAP = Layout(dp=2, overlap=True, small_buckets=True)
ZERO_2, ZERO_3 = Layout(dp=2, zero=2), Layout(dp=2, zero=3)
UNEVEN = Layout(dp=2, micro_batch=2, uneven=True)
SPLIT, CHUNKS = Layout(pp=2, schedule="zb-h1"), Layout(pp=2, chunks=2)
GROUPS, GROUPS_2 = Layout(dp=2, zero_group=1), Layout(dp=2, zero=2, zero_group=1)
OFFLOAD = Layout(dp=2, small_buckets=True, offload=True)
AWAY, AWAY_PP = Layout(offload_activations=True), Layout(pp=2, offload_activations=True)
RING, ULYSSES = Layout(cp=2), Layout(cp=2, cp_method="ulysses")
FULLY, LITTLE = Layout(recompute="full"), Layout(recompute="selective")
APART = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


# Tensor and sequence parallelism.


@mutant("norm gradients are not summed over tp", SP, "tp + sp", "gradient of model.norm.weight")
def no_norm_sum() -> Any:
    from megatron_aquila.optim.distributed import DistributedOptimizer

    return patched(DistributedOptimizer, "_sum_over_tp", lambda self: None)


@mutant("a row-parallel output is added tp times", SP, "tp + sp", "output of model.layers.0.self_attn")
def row_output_added_again() -> Any:
    from megatron_aquila.parallel import layers

    right = layers.reduce_scatter
    return patched(layers, "reduce_scatter", lambda x, group: right(x, group) * group.size)


@mutant("the gradient of the head's input stays a partial sum", TP, "tp", "gradient of model.norm.weight")
def no_head_reduce() -> Any:
    from megatron_aquila.parallel import vocab_loss

    return patched(vocab_loss, "all_reduce_", unreduced)


@mutant(
    "a column-parallel input gradient stays a partial sum",
    TP,
    "tp",
    "gradient of model.layers.2.post_attention_layernorm.weight",
)
def no_column_reduce() -> Any:
    from megatron_aquila.parallel import layers

    return patched(layers, "begin_all_reduce_", lambda x, group, overlap: Pending(x))


@mutant("sequence shards are gathered in the wrong order", SP, "tp + sp", "output of model.layers.0.self_attn")
def shards_out_of_order() -> Any:
    from megatron_aquila.parallel import layers

    right = layers.all_gather
    return patched(layers, "all_gather", lambda x, group: right(x, group).roll(x.shape[0], 0))


@mutant("the replicas of a norm weight drift apart", TP, "tp", "model.layers.0.input_layernorm.weight after sgd")
def replicas_drift() -> Any:
    from megatron_aquila.optim.distributed import DistributedOptimizer

    right = DistributedOptimizer.step

    def wrong(self: DistributedOptimizer, lr: float, clip: Clip) -> None:
        right(self, lr, clip)
        for bucket in self._buckets:
            bucket.weights += 1e-15 * (self._ctx.tp.rank if not bucket.layout.weight_decay else 0)

    return patched(DistributedOptimizer, "step", wrong)


@mutant("the exponentials of the loss are summed once too often: log(tp) more", TP, "tp", "loss")
def vocab_log_offset() -> Any:
    from megatron_aquila.parallel import vocab_loss

    right = vocab_loss._statistics

    def wrong(logits: torch.Tensor, labels: torch.Tensor, vocabulary: Any) -> Any:
        found, tp = right(logits, labels, vocabulary), vocabulary.tp
        return replace(found, log_sum_R=found.log_sum_R + math.log(tp.size))

    return patched(vocab_loss, "_statistics", wrong)


@mutant("the uneven last shard of the vocabulary is read into its padding", TP, "tp", "loss")
def vocab_padding_counts() -> Any:
    from megatron_aquila.parallel import vocab_loss

    return patched(vocab_loss, "num_real_columns", lambda shard_size, tp, vocab_size: shard_size)


@mutant("the head's gradient leaves out the last chunk of tokens", ONE, "world of one", "gradient of lm_head.weight")
def last_chunk_left_out() -> Any:
    from megatron_aquila.parallel import vocab_loss

    right = vocab_loss.accumulate_weight_gradient_

    def wrong(total: torch.Tensor, grad_y: torch.Tensor, x: torch.Tensor) -> None:
        if x.shape[0] == LOSS_CHUNK:
            right(total, grad_y, x)

    return patched(vocab_loss, "accumulate_weight_gradient_", wrong)


@mutant("tokens of other ranks are looked up, too", TP, "tp", "output of model.embed_tokens")
def foreign_tokens_embedded() -> Any:
    from megatron_aquila.parallel import vocab

    right = vocab.local_columns

    def wrong(*args: Any) -> Any:
        rows, is_mine = right(*args)
        return rows, torch.ones_like(is_mine)

    return within(vocab.VocabParallelEmbedding, "forward", lambda: patched(vocab, "local_columns", wrong))


@mutant("a tp rank has its neighbour's key heads", TP, "tp", "output of model.layers.0.self_attn")
def key_heads_swapped() -> Any:
    from megatron_aquila.model import attention

    right = attention.column_part

    def wrong(name: str, global_shape: tuple[int, int], tp: Any, *, local_row: int = 0) -> Any:
        part = right(name, global_shape, tp, local_row=local_row)
        if "k_proj" not in name:
            return part
        return replace(part, offset=((tp.rank + 1) % tp.size * part.shape[0], 0))

    return patched(attention, "column_part", wrong)


# The model.


@mutant(
    "query head n reads key head n % K, not n // (N / K)", ONE, "world of one", "output of model.layers.0.self_attn"
)
def query_heads_read_group_n_mod_k() -> Any:
    def wrong(attention: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any) -> torch.Tensor:
        heads = torch.arange(q.shape[2]) % k.shape[2]
        out: torch.Tensor = attention(q, k[:, :, heads], v[:, :, heads], documents)
        return out

    return other_attention(wrong)


@mutant("rotary positions grow twice as fast", ONE, "world of one", "output of model.layers.0.self_attn")
def rope_twice_as_fast() -> Any:
    from megatron_aquila.model import position

    right = position.rope_tables
    return patched(position, "rope_tables", lambda positions, **settings: right(positions * 2, **settings))


@mutant("a microbatch's loss is divided by its own tokens", ONE, "world of one", "gradient of lm_head.weight")
def mean_of_means() -> Any:
    from megatron_aquila.train.loss import LossSums

    right = LossSums.weigh

    def wrong(self: LossSums, batches: Any) -> Any:
        own = [float(batch.loss_mask_BS.sum()) for batch in batches]
        return [
            replace(batch, loss_weight=batch.loss_weight * self.num_tokens / tokens / 4)
            for batch, tokens in zip(right(self, batches), own, strict=True)
        ]

    return patched(LossSums, "weigh", wrong)


@mutant("the loss is divided by this replica's tokens", DP, "dp (ZeRO-1)", "loss")
def tokens_of_one_replica() -> Any:
    from megatron_aquila.train import step

    return patched(step, "all_reduce_", unreduced)


@mutant(
    "every replica counts alike, whatever it computes",
    UNEVEN,
    "uneven replicas",
    "gradient of lm_head.weight",
)
def replicas_count_alike() -> Any:
    from megatron_aquila.train.loss import LossSums

    right = LossSums.weigh

    def wrong(self: LossSums, batches: Any) -> Any:
        mean = UNEVEN.micro_batch
        return [
            replace(batch, loss_weight=batch.loss_weight * mean / len(batch.tokens_BS))
            for batch in right(self, batches)
        ]

    return patched(LossSums, "weigh", wrong)


@mutant(
    "a replica's samples begin as if all computed as many",
    UNEVEN,
    "uneven replicas",
    "output of model.embed_tokens",
)
def samples_as_if_even() -> Any:
    from megatron_aquila.plan.batches import BatchPlan

    right = BatchPlan.share_of

    def wrong(self: BatchPlan, dp_rank: int) -> Any:
        share = right(self, dp_rank)
        return replace(share, first=dp_rank * share.size)

    return patched(BatchPlan, "share_of", wrong)


# Pipelines.


@mutant("a stage leaves out its last layer", PP, "pp", "output of model.layers.2.self_attn")
def dropped_layer() -> Any:
    return _other_blocks(lambda blocks: blocks[:-1])


@mutant("a stage runs its last layer twice", PP, "pp", "output of model.layers.2.self_attn")
def repeated_layer() -> Any:
    return _other_blocks(lambda blocks: [*blocks, blocks[-1]])


def _other_blocks(change: Callable[[Any], Any]) -> Any:
    from megatron_aquila.model.aquila import AquilaStage

    right = AquilaStage._blocks

    def wrong(self: AquilaStage, *inputs: Any) -> torch.Tensor:
        blocks = self.blocks
        self.blocks = torch.nn.ModuleList(change(blocks)) if self.stage == 1 else blocks
        out = right(self, *inputs)
        self.blocks = blocks
        return out

    return patched(AquilaStage, "_blocks", wrong)


@mutant("two microbatches' activations change places", PP, "pp", "output of model.layers.2.self_attn")
def activations_swapped() -> Any:
    from megatron_aquila.pipeline.wire import P2PWire

    right, kept = P2PWire.send, list[torch.Tensor]()

    def wrong(self: P2PWire, op: Any, stage: int, microbatch: int, x: torch.Tensor) -> None:
        if op == "F" and microbatch == 0:
            kept.append(x)
            return
        right(self, op, stage, microbatch, x)
        if op == "F" and microbatch == 1:
            right(self, op, stage, microbatch, kept.pop())

    return patched(P2PWire, "send", wrong)


@mutant("activations travel in fp32", PP, "pp", "output of model.layers.2.self_attn")
def activations_rounded() -> Any:
    from megatron_aquila.pipeline.wire import P2PWire

    right = P2PWire.send
    return patched(P2PWire, "send", lambda self, op, stage, m, x: right(self, op, stage, m, x.float().to(x.dtype)))


@mutant("a weight gradient put off is never added", SPLIT, "schedule", "gradient of lm_head.weight")
def weight_gradient_never_paid() -> Any:
    from megatron_aquila.parallel.weight_grads import WeightGradQueue

    return patched(WeightGradQueue, "pay", lambda self, key: self._owed.pop(key) and None)


@mutant("a weight gradient put off is added twice", SPLIT, "schedule", "gradient of lm_head.weight")
def weight_gradient_paid_twice() -> Any:
    from megatron_aquila.parallel.weight_grads import WeightGradQueue

    def wrong(self: WeightGradQueue, key: Any) -> None:
        for job in 2 * self._owed.pop(key):
            job()

    return patched(WeightGradQueue, "pay", wrong)


@mutant("a rank's stages begin with the same weights", CHUNKS, "schedule", "output of model.layers.2.self_attn")
def chunks_initialised_alike() -> Any:
    right = observe.initialize

    def wrong(machine: Any) -> None:
        right(machine)
        first: dict[str, torch.Tensor] = {}
        for info in machine.infos:
            place = info.name.split(".", 3)[-1]  # within its layer
            info.param.data.copy_(first.setdefault(place, info.param.data))
        machine.optimizer.refresh_masters()

    return patched(observe, "initialize", wrong)


# Recomputation.

DOWN = "gradient of model.layers.2.mlp.down_proj.weight"


@mutant("what is recomputed starts from inputs in fp32", FULLY, "recompute", DOWN)
def recomputed_in_another_precision() -> Any:
    return _other_inputs(lambda x: x.float().to(x.dtype))


@mutant(
    "what is recomputed has another microbatch's input",
    FULLY,
    "recompute",
    DOWN,
)
def recomputed_from_another_microbatch() -> Any:
    before: dict[torch.Size, torch.Tensor] = {}

    def other(x: torch.Tensor) -> torch.Tensor:
        kept, before[x.shape] = before.get(x.shape, x), x
        return kept

    return _other_inputs(other)


@mutant(
    "a recomputed norm or SwiGLU starts from inputs in fp32",
    LITTLE,
    "recompute",
    "gradient of model.layers.2.mlp.down_proj.weight",
)
def module_recomputed_in_another_precision() -> Any:
    return _other_inputs(lambda x: x.float().to(x.dtype))


def _other_inputs(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    from megatron_aquila.model.recompute import _Run

    right = _Run.__init__

    def wrong(self: Any, function: Any, inputs: tuple[torch.Tensor, ...], hooks: Any) -> None:
        right(self, function, tuple(change(x.detach()).requires_grad_(x.requires_grad) for x in inputs), hooks)

    return patched(_Run, "__init__", wrong)


# Clipping and the update.


@mutant("the clip norm misses a parameter", ONE, "world of one", "gradient norm")
def parameter_missing_from_norm() -> Any:
    from megatron_aquila.optim import clip

    right = clip.counted
    return patched(clip, "counted", lambda flat: iter(()) if flat.info.name == "model.norm.weight" else right(flat))


@mutant("the clip norm counts replicated parameters on every tp rank", TP, "tp", "gradient norm")
def replicas_counted_in_norm() -> Any:
    from megatron_aquila.optim import clip

    return patched(clip, "counted", lambda flat: iter([(flat.start, flat.stop)]))


@mutant("each rank clips by the norm of its own shard", DP, "dp (ZeRO-1)", "gradient norm")
def norm_of_own_shard() -> Any:
    from megatron_aquila.optim import distributed
    from megatron_aquila.optim.distributed import DistributedOptimizer

    return within(DistributedOptimizer, "clip", lambda: patched(distributed, "all_reduce_", unreduced))


@mutant("gradients are averaged over the replicas", DP, "dp (ZeRO-1)", "gradient of lm_head.weight")
def gradients_averaged() -> Any:
    from megatron_aquila.optim.distributed import DistributedOptimizer

    right = DistributedOptimizer.reduce_gradients

    def wrong(self: DistributedOptimizer) -> None:
        right(self)
        for bucket in self._buckets:
            bucket.grad_shard /= self._ctx.dp_cp.size

    return patched(DistributedOptimizer, "reduce_gradients", wrong)


@mutant("gradients of the step before are left over", ONE, "world of one", "next gradient of lm_head.weight")
def gradients_left_over() -> Any:
    from megatron_aquila.optim.distributed import DistributedOptimizer

    def wrong(self: DistributedOptimizer, num_microbatches: int) -> None:
        for bucket in self._buckets:
            bucket._missing = num_microbatches * len(bucket.layout.slots)

    return patched(DistributedOptimizer, "begin_step", wrong)


@mutant("norm weights decay", ONE, "world of one", "model.layers.0.input_layernorm.weight after sgd")
def norms_decay() -> Any:
    from megatron_aquila.optim.rules import Sgd

    right = Sgd.update_
    return patched(Sgd, "update_", lambda *args, decays, **kwargs: right(*args, decays=True, **kwargs))


@mutant("Adam's bias correction counts one step too many", ONE, "world of one", "model.embed_tokens.weight after adamw")
def bias_correction_off_by_one() -> Any:
    from megatron_aquila.optim.rules import AdamW

    right = AdamW.update_
    return patched(AdamW, "update_", lambda *args, step, **kwargs: right(*args, step=step + 1, **kwargs))


@mutant("an optimizer shard begins an element late", DP, "dp (ZeRO-1)", "model.embed_tokens.weight after sgd")
def shard_border_off_by_one() -> Any:
    from megatron_aquila.optim.buckets import Bucket

    right = Bucket.begin_publish

    def wrong(self: Bucket) -> None:
        self.weight_shard.copy_(self.weight_shard.roll(1))
        right(self)

    return patched(Bucket, "begin_publish", wrong)


@mutant("replicas keep the old weights of the others' shards", DP, "dp (ZeRO-1)", "model.embed_tokens.weight after sgd")
def no_param_gather() -> Any:
    from megatron_aquila.optim import buckets

    return patched(buckets, "begin_all_gather_flat_", lambda out, shard, group, overlap: Pending(out))


@mutant("forward does not wait for weights that are still gathered", OVERLAP, "overlap", "next loss after sgd")
def stale_weights() -> Any:
    """The gather is as late as can be: it happens when it is waited for."""
    from megatron_aquila.optim import buckets

    right, no_waits = buckets.begin_all_gather_flat_, patched(build, "wait_before_forward", lambda *_: None)

    def late(out: torch.Tensor, *args: Any, overlap: bool) -> Pending:
        def gather() -> None:
            right(out, *args, overlap=False).wait()

        return Pending(out, finish=gather) if overlap else right(out, *args, overlap=False)

    return both(patched(buckets, "begin_all_gather_flat_", late), no_waits)


@mutant("a bucket is reduced before its last microbatch", OVERLAP, "overlap", "gradient of lm_head.weight")
def reduced_too_early() -> Any:
    from megatron_aquila.optim.buckets import Bucket

    right = Bucket.begin_reduce

    def wrong(self: Bucket) -> None:
        if self._missing is not None and self._missing > 0:
            self._missing -= 1
            if self._missing == len(self.layout.slots):
                self._missing = 0
                self._on_complete(self)

    def at_once(self: Bucket) -> None:
        right(self)
        assert self._reducing is not None, "just begun"
        self._reducing.wait()

    return both(patched(Bucket, "_count", wrong), patched(Bucket, "begin_reduce", at_once))


# The optimizer on the host.


@mutant(
    "the weights that come back from the host are the masters' before the update",
    OFFLOAD,
    "offload",
    "model.embed_tokens.weight after sgd",
)
def stale_master() -> Any:
    from megatron_aquila.optim.buckets import Bucket

    right_update, right_fetch = Bucket.begin_publish, Bucket.await_fetch

    def remember(self: Bucket) -> None:
        right_fetch(self)
        self.before = self.new_weights.clone()  # type: ignore[attr-defined]

    def wrong(self: Bucket) -> None:
        right_update(self)
        if self.host is not None:
            self.weight_shard.copy_(self.before)  # type: ignore[attr-defined]

    return both(patched(Bucket, "await_fetch", remember), patched(Bucket, "begin_publish", wrong))


@mutant(
    "one bucket's gradients never come to the host",
    OFFLOAD,
    "offload",
    "model.embed_tokens.weight after sgd",
)
def gradient_not_fetched() -> Any:
    from megatron_aquila.optim.buckets import Bucket

    right = Bucket.begin_fetch

    def wrong(self: Bucket) -> None:
        right(self)
        if self.host is not None and any(slot.info.name == "model.embed_tokens.weight" for slot in self.layout.slots):
            self.update_grad.zero_()

    return patched(Bucket, "begin_fetch", wrong)


# Activations on the host.


@mutant(
    "a buffer on the host is used again before its layer's backward",
    AWAY,
    "offload activations",
    "gradient of model.layers.0.mlp.down_proj.weight",
)
def buffer_used_again_too_soon() -> Any:
    from megatron_aquila.model.offload import Trip

    right = Trip.leave

    def wrong(self: Trip) -> None:
        right(self)
        assert self._buffer is not None, "something left"
        self._host.give(self._buffer)

    return patched(Trip, "leave", wrong)


@mutant(
    "the activations of another microbatch come back",
    AWAY_PP,
    "offload activations",
    "gradient of model.layers.1.mlp.down_proj.weight",
)
def activations_of_another_microbatch() -> Any:
    from megatron_aquila.model.offload import Trip

    left: list[Any] = []
    right_leave, right_fetch = Trip.leave, Trip.fetch

    def leave(self: Trip) -> None:
        right_leave(self)
        left.append(self._buffer)

    def wrong(self: Trip, grad: torch.Tensor | None = None) -> None:
        if self._buffer is not None:
            newest = next(one for one in reversed(left) if one.memory.nbytes == self._buffer.memory.nbytes)
            self._buffer.memory.copy_(newest.memory)
        right_fetch(self, grad)

    return both(patched(Trip, "leave", leave), patched(Trip, "fetch", wrong))


@mutant(
    "q, k and v come back as the first values of the projection that they are views of",
    AWAY,
    "offload activations",
    "gradient of model.layers.1.self_attn.v_proj.weight",
    model=BAICHUAN_13B,
)
def views_from_the_start() -> Any:
    from megatron_aquila.model.offload import Trip, _View

    right = Trip.unpack

    def wrong(self: Trip, packed: Any) -> torch.Tensor:
        return right(self, packed._replace(offset=0) if isinstance(packed, _View) else packed)

    return patched(Trip, "unpack", wrong)


# Sharded gradients and weights.


def _other_bring_in(wrong: Callable[[Any, torch.Tensor], None]) -> Any:
    """What is done, in place of adding it to the sum, with the shard of a round that has been reduced."""
    from megatron_aquila.optim.buckets import Bucket

    def bring_in(self: Bucket) -> None:
        if self._reducing is not None:
            wrong(self, self._reducing.wait())
            self._reducing = None
            self._grads.let_go()

    return patched(Bucket, "bring_in", bring_in)


@mutant("a round of sharded gradients is never brought in", ZERO_2, "ZeRO", "gradient of lm_head.weight")
def round_lost() -> Any:
    return _other_bring_in(lambda bucket, shard: None)


@mutant("the gradients of a round are counted twice", ZERO_2, "ZeRO", "gradient of lm_head.weight")
def round_counted_twice() -> Any:
    return _other_bring_in(lambda bucket, shard: bucket.grad_shard.add_(shard).add_(shard))


@mutant("a shard of gradients begins an element late", ZERO_2, "ZeRO", "gradient of lm_head.weight")
def gradient_border_off_by_one() -> Any:
    return _other_bring_in(lambda bucket, shard: bucket.grad_shard.add_(shard.roll(1)))


@mutant("a shard of weights begins an element late", ZERO_3, "ZeRO", "output of model.embed_tokens")
def weight_border_off_by_one() -> Any:
    from megatron_aquila.optim.buckets import Bucket

    right = Bucket.take_weights

    def wrong(self: Bucket) -> None:
        right(self)
        self.weight_shard.copy_(self.weight_shard.roll(1))

    return patched(Bucket, "take_weights", wrong)


@mutant("what was gathered is kept after an update", ZERO_3, "ZeRO", "model.embed_tokens.weight after sgd")
def gathered_before_the_update() -> Any:
    from megatron_aquila.optim.buckets import Bucket
    from megatron_aquila.optim.distributed import DistributedOptimizer

    right = Bucket.begin_publish

    def publish(self: Bucket) -> None:
        if not self.sharding.weights:
            right(self)

    return both(patched(DistributedOptimizer, "settle", lambda self: None), patched(Bucket, "begin_publish", publish))


@mutant("a bucket is let go of while it is read", ZERO_3, "ZeRO", "output of model.embed_tokens")
def let_go_too_early() -> Any:
    """Its memory belongs to something else then."""
    from megatron_aquila.optim.gathering import Gathering

    right = Gathering.read

    def wrong(self: Gathering, bucket: Any) -> None:
        right(self, bucket)
        bucket.weights.zero_()

    return patched(Gathering, "read", wrong)


# Sharded within groups of replicas.


@mutant("the groups' sums are not joined", GROUPS, "ZeRO in groups", "gradient of lm_head.weight")
def sums_not_joined() -> Any:
    from megatron_aquila.optim.buckets import Bucket

    return patched(Bucket, "begin_join", lambda self: None)


@mutant("every copy of a shard counts in the norm", GROUPS, "ZeRO in groups", "gradient norm")
def copies_counted_in_norm() -> Any:
    from megatron_aquila.optim.clip import counted_spans
    from megatron_aquila.optim.distributed import DistributedOptimizer

    right = DistributedOptimizer.__init__

    def wrong(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self._counted = [bucket.grad_shard[s] for bucket in self._buckets for s in counted_spans(bucket.pieces)]

    return patched(DistributedOptimizer, "__init__", wrong)


@mutant("sums are joined every round instead of once", GROUPS_2, "ZeRO in groups", "gradient of lm_head.weight")
def joined_every_round() -> Any:
    """What an earlier round has joined is then summed over the groups again."""
    from megatron_aquila.optim.buckets import Bucket

    right = Bucket.bring_in

    def wrong(self: Bucket) -> None:
        is_round = self._reducing is not None
        right(self)
        if is_round and not self.is_complete:
            self.begin_join()
            if self._joining is not None:
                self._joining.wait()
                self._joining = None

    return patched(Bucket, "bring_in", wrong)


# Documents. Rope is relative: while attention keeps documents apart, where their positions start changes nothing. So
# that bug is looked for where only positions are reset.


@mutant("attention sees the whole sample", ONE, "world of one", "output of model.layers.0.self_attn", *APART)
def mask_ignored() -> Any:
    return other_attention(lambda attention, q, k, v, documents: attention(q, k, v, None))


@mutant(
    "a document begins with the end of the one before",
    ONE,
    "world of one",
    "output of model.layers.0.self_attn",
    *APART,
)
def mask_off_by_one() -> Any:
    from megatron_aquila.data import loader

    right = loader.lay_out

    def wrong(samples: Any, **rules: Any) -> Any:
        tokens, labels, mask, positions, bounds = right(samples, **rules)
        if bounds is not None:
            bounds = bounds - (bounds % tokens.shape[1] == tokens.shape[1] // 2 + 1)
        return tokens, labels, mask, positions, bounds

    return patched(loader, "lay_out", wrong)


@mutant("positions count on", ONE, "world of one", "output of model.layers.0.self_attn", "reset_position_ids")
def positions_not_reset() -> Any:
    return _laid_out_without("reset_positions")


def _laid_out_without(rule: str) -> Any:
    """Batches as if ``rule`` were not asked for."""
    from megatron_aquila.data import loader

    right = loader.lay_out
    return patched(loader, "lay_out", lambda samples, **rules: right(samples, **{**rules, rule: False}))


@mutant(
    "rotary positions skip one after a document's start",
    ONE,
    "world of one",
    "output of model.layers.0.self_attn",
    *APART,
)
def positions_skip_one_after_a_start() -> Any:
    from megatron_aquila.model import position

    right = position.rope_tables
    return patched(
        position, "rope_tables", lambda positions, **settings: right(positions + (positions > 0), **settings)
    )


@mutant("the loss counts what follows the end of a document", ONE, "world of one", "loss", *APART)
def end_of_document_counts() -> Any:
    return _laid_out_without("mask_loss")


# Context parallelism.


@mutant("the loss is divided by one cp rank's tokens", RING, "cp (ring)", "loss")
def tokens_of_one_context_rank() -> Any:
    from megatron_aquila.train import step

    return patched(step, "all_reduce_", unreduced)


@mutant("rope positions are off by one on a cp shard", RING, "cp (ring)", "output of model.layers.0.self_attn")
def positions_off_by_one_on_a_shard() -> Any:
    right = observe.machine_batches

    def wrong(machine: Any) -> Any:
        late = machine.ctx.cp.rank > 0
        return [replace(batch, positions_BS=batch.positions_BS + late) for batch in right(machine)]

    return patched(observe, "machine_batches", wrong)


def _other_blocks_of_ring(wrong: Callable[..., Any]) -> Any:
    """What meets in a step of the ring is ``wrong(ring_blocks, bounds, **places)``."""
    from megatron_aquila.parallel import ring

    return patched(ring, "ring_blocks", partial(wrong, ring.ring_blocks))


@mutant("a ring's step has the mask of the next one", RING, "cp (ring)", "output of model.layers.0.self_attn")
def mask_of_another_block() -> Any:
    def wrong(right: Any, bounds: Any, *, owner: int, cp: int, **places: Any) -> Any:
        return right(bounds, owner=(owner - 1) % cp, cp=cp, **places)

    return _other_blocks_of_ring(wrong)


@mutant(
    "a document that crosses a shard's border is cut there",
    RING,
    "cp (ring)",
    "output of model.layers.0.self_attn",
    *APART,
)
def documents_end_with_a_shard() -> Any:
    def wrong(right: Any, bounds: Any, *, rank: int, owner: int, **places: Any) -> Any:
        return right(bounds, rank=rank, owner=owner, **places) if rank == owner else []

    return _other_blocks_of_ring(wrong)


@mutant(
    "keys of other shards are seen across documents", RING, "cp (ring)", "output of model.layers.0.self_attn", *APART
)
def other_shards_know_no_documents() -> Any:
    def wrong(right: Any, bounds: Any, *, rank: int, owner: int, **places: Any) -> Any:
        return right(bounds if rank == owner else None, rank=rank, owner=owner, **places)

    return _other_blocks_of_ring(wrong)


@mutant("a ring's parts are added without rescaling", RING, "cp (ring)", "output of model.layers.0.self_attn")
def parts_not_rescaled() -> Any:
    from megatron_aquila.parallel import ring

    def wrong(total: Any, part: Any) -> None:
        total[0].add_(part[0])
        total[1].copy_(torch.logaddexp(total[1], part[1]))

    return patched(ring, "merge_", wrong)


@mutant(
    "gradients of keys and values stop a rank before home",
    RING,
    "cp (ring)",
    "gradient of model.layers.2.self_attn.v_proj.weight",
)
def key_gradients_on_the_wrong_rank() -> Any:
    from megatron_aquila.parallel import ring

    right = ring.begin_pass_on

    def not_home() -> Any:
        turns = itertools.count(1)

        def wrong(x: torch.Tensor, cp: Any, *, overlap: bool) -> Pending:
            return Pending(x) if next(turns) == 2 * cp.size - 1 else right(x, cp, overlap=overlap)

        return patched(ring, "begin_pass_on", wrong)

    return within(ring._Ring, "backward", not_home)


@mutant("Ulysses gives the ranks each other's key heads", ULYSSES, "cp (ulysses)", "output of model.layers.0.self_attn")
def key_heads_of_another_context_rank() -> Any:
    from megatron_aquila.parallel.ulysses import UlyssesAttention

    right = UlyssesAttention.__call__

    def wrong(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any = None) -> torch.Tensor:
        return right(self, q, k.roll(k.shape[2] // self.cp.size, 2), v, documents)

    return patched(UlyssesAttention, "__call__", wrong)


@mutant(
    "Ulysses leaves the ranks' tokens in another order", ULYSSES, "cp (ulysses)", "output of model.layers.0.self_attn"
)
def tokens_in_another_order() -> Any:
    from megatron_aquila.parallel import ulysses

    right = ulysses._to_heads
    return patched(ulysses, "_to_heads", lambda x, cp: right(x, cp).roll(x.shape[0], 0))


@mutant("gradients are summed over dp only, not over cp", RING, "cp (ring)", "gradient of lm_head.weight")
def no_sum_over_context_ranks() -> Any:
    from megatron_aquila.optim import buckets

    def own(out: torch.Tensor, full: torch.Tensor, group: Any, **_: Any) -> Pending:
        return Pending(out.copy_(full.chunk(group.size)[group.rank]))

    return patched(buckets, "begin_reduce_scatter_flat_", own)


# Families.


@mutant(
    "every tp rank takes the slopes of the first heads",
    TP,
    "tp",
    "output of model.layers.0.self_attn",
    model=BAICHUAN_13B,
)
def slopes_of_the_first_heads() -> Any:
    from megatron_aquila.model import position

    right = position.rank_scores
    return patched(position, "rank_scores", lambda shape, tp: right(shape, replace(tp, rank=0)))


@mutant(
    "slopes go on where the power of two ends",
    ONE,
    "world of one",
    "output of model.layers.0.self_attn",
    model=BAICHUAN_13B,
)
def slopes_go_on() -> Any:
    from megatron_aquila.model import position

    return patched(position, "alibi_slopes", lambda n: tuple(2.0 ** (-8 * i / n) for i in range(1, n + 1)))


@mutant("the max-z loss is counted once a tp rank", TP, "tp", "loss", model=BAICHUAN_7B)
def max_z_loss_tp_times() -> Any:
    from megatron_aquila.parallel.vocab_loss import _Vocabulary

    right = _Vocabulary.losses

    def wrong(self: Any, found: Any) -> Any:
        return right(replace(self, max_z_loss=self.max_z_loss * self.tp.size), found)

    return patched(_Vocabulary, "losses", wrong)


@mutant(
    "each tp rank's largest logit gets the max-z loss's gradient",
    TP,
    "tp",
    "gradient of lm_head.weight",
    model=BAICHUAN_7B,
)
def max_z_gradient_of_the_own_largest() -> Any:
    right = build.choose_kernels

    def choose(*args: Any, **kwargs: Any) -> Any:
        kernels = right(*args, **kwargs)

        def wrong(logits: torch.Tensor, *args: Any, top: Any, num_real: int) -> None:
            own = logits[:, :num_real].amax(-1)
            kernels.softmax_gradient(logits, *args, top=(own, top[1]), num_real=num_real)

        return replace(kernels, softmax_gradient=wrong)

    return patched(build, "choose_kernels", choose)


@mutant(
    "the head's gradient is not taken through the rows' length",
    ONE,
    "world of one",
    "gradient of lm_head.weight",
    model=BAICHUAN_7B,
)
def head_gradient_along_its_rows() -> Any:
    from megatron_aquila.parallel import vocab_loss

    return patched(vocab_loss, "through_unit_rows_", unreduced)


@mutant("the head is used as it is stored", ONE, "world of one", "loss", model=BAICHUAN_7B)
def head_of_any_length() -> Any:
    from megatron_aquila.parallel import vocab_loss

    return patched(vocab_loss, "rows_of_length_1", unreduced)


@mutant(
    "interleaved pairs are turned as halves",
    ONE,
    "world of one",
    "output of model.layers.0.self_attn",
    model=AQUILA,
)
def interleaved_turned_as_halves() -> Any:
    from megatron_aquila.model import attention

    return patched(attention, "head_splitter", lambda shape, kernels: kernels.rope_qkv)


@mutant("scores are not clamped", ONE, "world of one", "output of model.layers.0.self_attn", model=AQUILA)
def scores_not_clamped() -> Any:
    from megatron_aquila.model import position

    return patched(position, "rank_scores", lambda shape, tp: None)


@mutant("far pairs begin one token late", ONE, "world of one", "output of model.layers.0.self_attn", model=TWO_RANGE)
def far_begins_late() -> Any:
    from megatron_aquila.model import position

    right = position.two_ranges
    return patched(position, "two_ranges", lambda shape: replace(right(shape), threshold=shape.rope_trained_len + 1))


@mutant(
    "the gradient of what far pairs are scored with is not turned back",
    ONE,
    "world of one",
    "gradient of model.layers.2.self_attn.k_proj.weight",
    model=TWO_RANGE,
)
def far_gradient_as_it_comes() -> Any:
    from megatron_aquila.kernels.two_range import Ranges

    return patched(Ranges, "far_k_gradient", lambda self, grad, places: grad)


# Families whose samples are split.


def _places_in_the_shard() -> Any:
    """Tokens of a ring that meet among themselves lie where they do in the shard."""
    from megatron_aquila.parallel import ring

    right = ring._meeting

    def meeting(block: Any) -> Any:
        found = right(block)
        places = (range(sum(map(len, found.queries))),)
        return replace(found, queries=places, keys=places) if found.is_causal else found

    return patched(ring, "_meeting", meeting)


@mutant(
    "a ring counts distances from the beginning of its shard",
    RING,
    "cp (ring)",
    "output of model.layers.0.self_attn",
    model=BAICHUAN_13B,
)
def distances_of_a_shard() -> Any:
    return _places_in_the_shard()


@mutant(
    "far pairs of a ring are those far apart in its shard",
    RING,
    "cp (ring)",
    "output of model.layers.0.self_attn",
    model=TWO_RANGE,
)
def far_in_a_shard() -> Any:
    return _places_in_the_shard()


@mutant(
    "every rank of Ulysses takes the slopes of the first heads",
    ULYSSES,
    "cp (ulysses)",
    "output of model.layers.0.self_attn",
    model=BAICHUAN_13B,
)
def slopes_of_the_first_ulysses_heads() -> Any:
    from megatron_aquila.kernels.scores import Scores

    right = Scores.share
    return patched(Scores, "share", lambda self, rank, size: right(self, 0, size))


@mutant(
    "a ring clamps merged outputs in place of scores",
    RING,
    "cp (ring)",
    "output of model.layers.0.self_attn",
    model=AQUILA,
)
def clamp_after_the_merge() -> Any:
    from megatron_aquila.kernels.attention_blocks import ScoreBlocks
    from megatron_aquila.parallel import ring

    right, clamp = ring.merge_, SCORE_CLAMP

    def wrong(total: Any, part: Any) -> None:
        right(total, part)
        total[0].clamp_(-clamp, clamp)

    return both(patched(ScoreBlocks, "of", lambda self, scores: self), patched(ring, "merge_", wrong))


def mutants_table() -> str:
    """The table as Markdown. That each line is true is what tests/verify/test_mutants.py tests."""
    rows = [(one.bug, str(one.layout), one.axis, one.tensor) for one in MUTANTS.values()]
    return markdown(("bug", "layout", "caught by the row", "first wrong tensor"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table into a page."""
    about = "Write the table of bugs, and which checks must find each, where the page keeps its place."
    parser = ArgumentParser(prog="python -m tests.verify.mutants", description=about)
    parser.add_argument("page", type=Path, metavar="PAGE", help="docs/parity.md")
    page = parser.parse_args(argv).page
    write(page, put(page.read_text(encoding="utf-8"), "mutants", mutants_table()))


if __name__ == "__main__":
    main()
