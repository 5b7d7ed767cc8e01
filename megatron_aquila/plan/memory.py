"""Memory of one rank before anything is allocated: a sum of named parts, each with its formula.

A test traces whole steps of the recipes: each part is exact, the peak within 0.001 % above and 6 % below the total.
Not in it: the device's own context, NCCL's buffers and fragmentation (2 to 4 GiB of a GPU in practice), and the tokens
of a step, 28 bytes each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_aquila.plan.activations import Divided, LayerActivations
from megatron_aquila.plan.attention_memory import attention_moment
from megatron_aquila.plan.buckets import StageBucket, rank_buckets, stage_parameters
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.loss_chunks import loss_moment
from megatron_aquila.plan.offload import HostMemory, on_host, pinned_bytes
from megatron_aquila.plan.recompute import KEEP_ALL, NO_MODULES, Recompute, RecomputePlan
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.shape import ModelShape, Precision
from megatron_aquila.plan.sharding import Order, ShardedMatrices
from megatron_aquila.plan.stages import ScheduleName, StagePlan

ITEM_BYTES: dict[Precision, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "fp8": 2}
GRADIENT_BYTES: dict[Precision, int] = {"bf16": 4, "fp16": 4, "fp32": 4, "fp64": 8, "fp8": 4}
MOMENTS = {"adamw": 2, "sgd": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank by purpose."""

    weights: int
    main_grads: int
    master_weights: int
    optimizer_states: int
    activations: int
    logits: int
    temporaries: int

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the estimate needs beside the shape; every count of tokens is ``micro_batch * shape.seq_len / cp``.

    With sharded gradients or weights it takes the ``order`` of a step's work. ``pinned``: what travels between host and
    device is so on the host.
    """

    shape: ModelShape
    grid: RankGrid
    stages: StagePlan
    micro_batch: int
    num_microbatches: int
    schedule: ScheduleName = "1f1b"
    sequence_parallel: bool = False
    context_method: ContextMethod = "ring"
    precision: Precision = "bf16"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    master_weights: Literal["fp32", "remainder"] = "fp32"
    bucket_bytes: int = 128 * 2**20
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    deterministic_reduce: bool = False
    overlap: bool = True
    recompute: RecomputePlan = KEEP_ALL
    fuse_main_grads: bool = True
    loss_chunk_tokens: int | None = None
    offload_optimizer: float = 0.0
    offload_activations: int = 0
    pinned: bool = False
    zero: int = 1
    order: Order | None = None

    def of_rank(self, rank: int) -> Memory:
        """Bytes of pipeline rank ``rank``: of all its stages."""
        stages, gradient = self.stages.stages_of(rank), GRADIENT_BYTES[self.precision]
        buckets = self._buckets(rank)
        # those whose masters and states are not on the host
        shard = sum(bucket.elements for bucket in buckets) // self.grid.num_shards - sum(self._offloaded(rank))
        return Memory(
            weights=self._held(rank, buckets, from_level=3) * self._item,
            main_grads=self._held(rank, buckets, from_level=2) * gradient,
            master_weights=shard * self._master,
            optimizer_states=shard * self._moments,
            activations=self._kept(rank),
            logits=sum(max(1, count) * self._logits(stage) for stage, count in self._by_stage(rank).items()),
            temporaries=max(self._temporaries(stage) + self._at_work(stage) for stage in stages)
            + self._reduced_at_once(buckets) * self._copied_while_reduced(),
        )

    def host_of_rank(self, rank: int) -> HostMemory:
        """Bytes of pipeline rank ``rank`` in its host's memory, of what the device has not."""
        shards = self._offloaded(rank)
        shard, taken = sum(shards), pinned_bytes if self.pinned else int
        return HostMemory(
            gradients=sum(taken(size * GRADIENT_BYTES[self.precision]) for size in shards),
            weights=sum(taken(size * self._item) for size in shards),
            master_weights=shard * self._master,
            optimizer_states=shard * self._moments,
            activations=self._away(rank),
        )

    def peak(self) -> Memory:
        """The memory of the rank that needs the most."""
        return max((self.of_rank(rank) for rank in range(self.stages.num_ranks)), key=lambda memory: memory.total)

    def in_flight(self, rank: int) -> int:
        """Activations, each of one microbatch in one stage, that a rank keeps at once; the schedules' own peaks.

        For p ranks, m microbatches and v stages a rank: GPipe all, ``m v``; 1F1B ``p - rank``; interleaved, which goes
        through the stages in rounds of p or a few more, ``2 (p - 1 - rank) + (v - 1) round + 1``; ZB-H1 on every rank
        as many as 1F1B on the first; ZB-V twice that, and less on the first ranks while m is below 2 p - 1.
        """
        p, m, v = self.stages.num_ranks, self.num_microbatches, self.stages.chunks
        behind = p - 1 - rank
        match self.schedule:
            case "gpipe":
                most = m * v
            case "zb-h1":
                most = p
            case "zb-v":
                most = min(2 * p, m + 1 + rank)
            case "1f1b":
                longest_round = -(-m // max(1, m // p))
                most = behind + 1 if v == 1 else 2 * behind + (v - 1) * longest_round + 1
        return min(most, m * v)

    def _by_stage(self, rank: int) -> dict[int, int]:
        """What a rank keeps of each stage, counted on its largest stages first: never less than the schedule's peak.

        The head's backward follows its forward at once in 1F1B and ZB-V; where interleaved goes through the stages in
        rounds that are not all equal, as many forwards later as there are stages a rank.
        """
        stages, left, m = self.stages.stages_of(rank), self.in_flight(rank), self.num_microbatches
        in_a_row = 1 if m % max(1, m // self.stages.num_ranks) == 0 else min(m, self.stages.chunks)
        most_of_head = {"1f1b": in_a_row, "zb-v": 1}.get(self.schedule, m)
        kept = dict.fromkeys(stages, 0)
        for stage in sorted(stages, key=lambda s: self._activations(s, Recompute()), reverse=True):
            kept[stage] = min(left, most_of_head if self.stages.has_head(stage) else m)
            left -= kept[stage]
        return kept

    def stage_params(self, stage: int) -> int:
        """Elements of this rank's shard of the stage, padded rows included; norms are whole on every rank."""
        return sum(parameter.elements for parameter in stage_parameters(self.shape, self.stages, stage, self.grid.tp))

    def _held(self, rank: int, buckets: Sequence[StageBucket], *, from_level: int) -> int:
        """Elements of weights (``from_level`` 3) or gradients (2): all, or from that level of ZeRO on norms, the
        rank's shard of the matrices, and what of these is whole at the widest moment.
        """
        matrices = [bucket for bucket in buckets if bucket.decays]
        whole, sharded = (sum(bucket.elements for bucket in some) for some in (buckets, matrices))
        if self.zero < from_level:
            return whole
        at_once = self._whole_at_once(rank, matrices, from_level=from_level)
        return whole - sharded + sharded // self.grid.num_shards + at_once

    def _whole_at_once(self, rank: int, matrices: Sequence[StageBucket], *, from_level: int) -> int:
        """Elements of ``matrices``, of weights or gradients as ``_held`` takes them, that have memory at once."""
        assert self.order is not None, f"the order of work decides what --zero {self.zero} keeps"
        work = ShardedMatrices(
            stages=self.stages,
            buckets=matrices,
            num_pieces=self.grid.num_pieces(in_rank_order=self.deterministic_reduce),
            recompute=self.recompute,
            keeps_logits=self._keeps_logits,
            fuse_main_grads=self.fuse_main_grads,
            overlap=self.overlap,
        )
        passes = self.order[rank]
        return work.gathered(passes).most if from_level == 3 else work.reduced(passes).most

    def _reduced_at_once(self, buckets: Sequence[StageBucket]) -> int:
        """Elements of the largest bucket; where gradients are sharded, those of all norms may be beside it."""
        norms = sum(bucket.elements for bucket in buckets if not bucket.decays) if self.zero > 1 else 0
        return max(bucket.elements for bucket in buckets) + norms

    def _copied_while_reduced(self) -> int:
        """Bytes an element of a bucket that a reduction which is not in place holds: of two buckets with overlap.

        Of sharded gradients one round is under way at a time. In rank order over groups its pieces are laid out anew.
        """
        if self.grid.num_pieces(in_rank_order=self.deterministic_reduce) == 1:
            return 0
        travels = 2 if self.grad_reduce == "bf16" else GRADIENT_BYTES[self.precision]
        is_cut = self.deterministic_reduce and self.grid.num_shards > 1 < self.grid.num_copies
        copies = (self.grad_reduce == "bf16" or is_cut) + self.deterministic_reduce
        return travels * copies * (2 if self.overlap and self.zero == 1 else 1)

    def _offloaded(self, rank: int) -> list[int]:
        """Elements of each of a rank's shards that are on its host."""
        sizes = [bucket.elements for bucket in self._buckets(rank)]
        chosen = zip(sizes, on_host(sizes, self.offload_optimizer), strict=True)
        return [size // self.grid.num_shards for size, is_on_host in chosen if is_on_host]

    def _buckets(self, rank: int) -> list[StageBucket]:
        limit, replicas = self.bucket_bytes // GRADIENT_BYTES[self.precision], self.grid.size("dp", "cp")
        return rank_buckets(self.shape, self.stages, rank, tp=self.grid.tp, limit=limit, num_shards=replicas)

    @property
    def _master(self) -> int:
        """Bytes of an element's master, where that is not the weight."""
        return 0 if self._item >= 4 else 2 if self.master_weights == "remainder" else 4

    @property
    def _moments(self) -> int:
        """Bytes of an element's optimizer states."""
        return MOMENTS[self.optimizer] * (2 if self.moments_dtype == "bf16" else GRADIENT_BYTES[self.precision])

    @property
    def _item(self) -> int:
        """Bytes of a weight or an activation."""
        return ITEM_BYTES[self.precision]

    @property
    def _wide(self) -> int:
        """Bytes of what is computed in fp32 or wider."""
        return max(4, self._item)

    @property
    def _tokens(self) -> int:
        """Tokens of a microbatch on one rank."""
        return self._layers.tokens

    @property
    def _layers(self) -> LayerActivations:
        return LayerActivations(
            shape=self.shape,
            grid=self.grid,
            micro_batch=self.micro_batch,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_method,
            item=self._item,
            wide=self._wide,
            offloaded=self.offload_activations,
            pinned=self.pinned,
        )

    def _kept(self, rank: int) -> int:
        """Bytes that autograd keeps on a rank at its fullest.

        A backward without weight gradients leaves what those need, see ``_owed``: on rank r up to r microbatches of
        ZB-H1; at the end of ZB-V r of either stage, while p - r more are left of the first. One more is between its I
        and its W, and the embedding's gradient is made beside it.
        """
        in_flight, stages = self._by_stage(rank), self.stages.stages_of(rank)
        kept = sum(self._window(stage, count) for stage, count in in_flight.items())
        if self.schedule not in ("zb-h1", "zb-v"):
            return kept
        owed, between = min(rank, self.num_microbatches), max(self._in_between(stage) for stage in stages)
        in_full = sum(owed * self._owed(stage) for stage in stages)
        if self.schedule == "zb-h1":
            return self._window(stages[0], in_flight[stages[0]] - owed) + in_full + between
        left = min(self.stages.num_ranks, self.num_microbatches) - owed
        return max(kept, self._window(stages[0], left) + in_full) + between

    def _owed(self, stage: int) -> int:
        """Bytes of one microbatch that wait for their W: as much as without recomputation, and what was gathered."""
        return self._activations(stage, Recompute(), is_whole=True) + self._gathered(stage)

    def _in_between(self, stage: int) -> int:
        """Bytes beside a microbatch in flight once it has had its I: what it owes, less what it kept for that."""
        light = min(self._activations(stage, recompute) for recompute in self._recomputes(stage))
        rows = self.shape.padded_vocab_size // self.grid.tp if self.stages.has_embedding(stage) else 0
        return self._owed(stage) - light + self._wide * rows * self.shape.hidden_size

    def _gathered(self, stage: int) -> int:
        """Under sequence parallel a weight gradient is owed with whole operands: x of a column, grad_y of a row."""
        head = self.stages.has_head(stage) and self._keeps_logits
        operands = 4 * len(self.stages.layers[stage]) + head
        return operands * self._item * self.shape.hidden_size * (self._tokens - self._layers.residual_tokens)

    def _away(self, rank: int) -> int:
        """Bytes of activations on the host at its fullest: of what is in flight but not yet back for its I or B."""
        in_flight = self._by_stage(rank)
        if self.schedule == "zb-h1":
            in_flight = dict.fromkeys(in_flight, min(self.stages.num_ranks - rank, self.num_microbatches))
        return sum(self._window(stage, count, is_away=True) for stage, count in in_flight.items())

    def _window(self, stage: int, count: int, *, is_away: bool = False) -> int:
        """Bytes that autograd keeps of ``count`` consecutive microbatches in a stage, whichever keep the most."""
        again = self._recomputes(stage)
        sizes = [self._divided(stage, each).taken if is_away else self._activations(stage, each) for each in again]
        return max(sum(sizes[first : first + count]) for first in range(self.num_microbatches - count + 1))

    def _divided(self, stage: int, recompute: Recompute) -> Divided:
        """What the stage's layers keep of one microbatch, here and on the host."""
        return self._layers.divided(len(self.stages.layers[stage]), recompute)

    def _activations(self, stage: int, recompute: Recompute, *, is_whole: bool = False) -> int:
        """Bytes that autograd keeps of one microbatch, every op saving its inputs once; a test traces the model.

        Those on the host are not counted, unless ``is_whole``.

        This is 8.0 GiB of the 7B at 2,048 tokens, without recomputation. Of a recomputed group its input is kept.
        Beside the layers: the rotary tables, if positions turn, the embedding's rows and which of them are this rank's,
        the final norm's input and scale and the gradient of its output, and each token's weight in the loss. Where
        main gradients are not added to within the product, also the head's own. Where the logits are kept, instead of
        these two the norm's output, a maximum and two sums.
        """
        layers = self._divided(stage, recompute)
        tables = 0 if self.shape.position_embedding == "alibi" else self._wide * 2 * self.shape.head_dim * self._tokens
        kept = layers.here + layers.away * is_whole + tables
        if self.stages.has_embedding(stage):
            kept += (8 + 1) * self._tokens
        if self.stages.has_head(stage):
            modules = recompute.modules if self._keeps_logits else NO_MODULES
            kept += self._layers.norm(modules) + self._wide * (3 if self._keeps_logits else 1) * self._tokens
            if not (self._keeps_logits or self.fuse_main_grads):
                kept += self._wide * self._columns * self.shape.hidden_size
        return kept

    def _at_work(self, stage: int) -> int:
        """Bytes beside what is kept: the largest group of layers, all there between its recomputation and the end of
        its backward, and those that leave for the host or come back.
        """
        found = set(self._recomputes(stage))
        largest = max((size for recompute in found for size in recompute.groups), default=0)
        return largest * self._layers.layer() + max(self._divided(stage, recompute).passing for recompute in found)

    def _recomputes(self, stage: int) -> list[Recompute]:
        """What the stage recomputes, by microbatch."""
        return [self.recompute.at(stage, microbatch) for microbatch in range(self.num_microbatches)]

    def _logits(self, stage: int) -> int:
        """Bytes of one microbatch's logits, if they are kept from forward to backward."""
        return self._tokens * self._item * self._columns if self.stages.has_head(stage) and self._keeps_logits else 0

    @property
    def _keeps_logits(self) -> bool:
        return self.loss_chunk_tokens == 0

    @property
    def _columns(self) -> int:
        """Logits of a token on one rank, padded columns included."""
        return self.shape.padded_vocab_size // self.grid.tp

    def _loss(self) -> int:
        """Bytes of the loss's widest moment."""
        return loss_moment(
            self.shape,
            tokens=self._tokens,
            columns=self._columns,
            item=self._item,
            wide=self._wide,
            chunk_tokens=self.loss_chunk_tokens,
            sequence_parallel=self.sequence_parallel,
        )

    def _attention(self) -> int:
        """Bytes of the widest moment of attention's backward, where that is not the kernel's own affair."""
        return attention_moment(
            self.shape,
            self.grid,
            micro_batch=self.micro_batch,
            item=self._item,
            wide=self._wide,
            context_method=self.context_method,
        )

    def _temporaries(self, stage: int) -> int:
        """Bytes of the widest moment of a backward: the widest of four.

        SwiGLU's: the gradient that came, F, those that leave, 2 F, and a product in at least four bytes, F; where that
        is wider than the type, gate, up and the gradient in it, too, 3 F. A linear's: gradients of gate, up and their
        product, x gathered twice, and the largest weight's gradient, which lives until it is added to the main
        gradient. Attention's. And the loss's.
        """
        shape, ffn = self.shape, self._tokens * self.shape.ffn_size // self.grid.tp
        swiglu = ffn * (3 * self._item + self._wide * (4 if self._wide > self._item else 1))
        largest = max(2 * shape.ffn_size, shape.padded_vocab_size) * shape.hidden_size // self.grid.tp
        linear = self._item * (3 * ffn + 2 * self._tokens * shape.hidden_size + largest)
        return max(
            swiglu,
            linear,
            self._attention(),
            self._loss() if self.stages.has_head(stage) else 0,
        )
