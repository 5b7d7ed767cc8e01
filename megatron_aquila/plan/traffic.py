"""What a rank says and hears in one step: how many collectives and messages, and how many bytes they move.

``docs/communication.md`` gives the formulas in words; a test counts the calls of real steps and demands equality.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_aquila.plan.activations import LayerActivations
from megatron_aquila.plan.buckets import StageBucket, rank_buckets
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.loss_chunks import loss_chunk_tokens
from megatron_aquila.plan.memory import GRADIENT_BYTES, ITEM_BYTES
from megatron_aquila.plan.offload import on_host
from megatron_aquila.plan.recompute import KEEP_ALL, RecomputePlan
from megatron_aquila.plan.sequence import ContextMethod, num_shared_heads
from megatron_aquila.plan.shape import ModelShape, Precision
from megatron_aquila.plan.sharding import calls
from megatron_aquila.plan.stages import StagePlan
from megatron_aquila.plan.work import Order, Passes

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "receive", "to host", "from host"]
GroupName = Literal["tp", "cp", "pp", "dp_cp", "shards", "copies", "world", "host"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Calls of one purpose and kind that a rank makes in a step.

    ``num_bytes`` counts the whole tensor of every call: what an all-gather returns, and what all others take.
    ``group_size`` ranks take part in each; what goes to a rank's own host and comes from there is no other rank's.
    """

    what: str
    kind: Kind
    group: GroupName
    group_size: int
    count: int
    num_bytes: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this rank where the group works as a ring; fewest possible for its kind."""
        rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
        if self.kind in rounds:
            return rounds[self.kind] * self.num_bytes * (self.group_size - 1) // self.group_size
        return self.num_bytes if self.kind == "send" else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficPlan:
    """What the count needs beside the shape. ``num_sources`` are the data sets of the blend; with sharded gradients or
    weights it takes the ``order`` of a step's work, where nothing is left of a validation before it.
    """

    shape: ModelShape
    grid: RankGrid
    stages: StagePlan
    micro_batch: int
    num_microbatches: int
    sequence_parallel: bool = False
    context_method: ContextMethod = "ring"
    precision: Precision = "bf16"
    bucket_bytes: int = 128 * 2**20
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    deterministic_reduce: bool = False
    recompute: RecomputePlan = KEEP_ALL
    num_sources: int = 1
    loss_chunk_tokens: int | None = None
    offload_optimizer: float = 0.0
    offload_activations: int = 0
    zero: int = 1
    overlap: bool = True
    fuse_main_grads: bool = True
    order: Order | None = None

    def of_rank(self, pp_rank: int) -> tuple[Traffic, ...]:
        """One step of any rank at ``pp_rank`` of the pipeline, by purpose; nothing is said in a group of one."""
        stages = self.stages.stages_of(pp_rank)
        rows = [
            *(row for stage in stages for row in self._of_stage(stage)),
            *self._norm_gradients(stages),
            *self._replicas(pp_rank),
            *self._world(),
            *self._host(pp_rank),
            *(row for stage in stages for row in self._away(stage)),
        ]
        return _merged(row for row in rows if (row.group_size > 1 or row.group == "host") and row.count > 0)

    def _of_stage(self, stage: int) -> Iterator[Traffic]:
        """What happens for every microbatch."""
        if self.stages.has_embedding(stage):
            yield from self._linears("embedding", columns=0, rows=1)  # summed as a row-parallel linear's output is
        yield from self._linears("layers", columns=2, rows=2, times=len(self.stages.layers[stage]))
        yield from self._recomputed(stage)
        yield from self._attention(stage)
        if self.stages.has_head(stage):
            yield from self._head()
        yield from self._messages(stage)

    def _linears(self, what: str, *, columns: int, rows: int, times: int = 1) -> Iterator[Traffic]:
        """Column- and row-parallel linears, ``times`` over: every call moves a microbatch's whole hidden states.

        A column gathers its input forward, and again backward, where it scatters the input's gradient; a row scatters
        its output forward and gathers its gradient backward. Without sequence parallel only the sums remain.
        """
        calls: list[tuple[str, Kind, int]] = [("forward", "all-reduce", rows), ("backward", "all-reduce", columns)]
        if self.sequence_parallel:
            calls = [
                ("forward", "all-gather", columns),
                ("forward", "reduce-scatter", rows),
                ("backward", "all-gather", columns + rows),
                ("backward", "reduce-scatter", columns),
            ]
        for direction, kind, count in calls:
            total = times * count * self.num_microbatches
            yield self._row(f"{what} {direction}", kind, "tp", total, self._hidden_states)

    def _recomputed(self, stage: int) -> Iterator[Traffic]:
        """A group of layers that is recomputed runs its forward again, but for its last projection."""
        plans = [self.recompute.at(stage, microbatch).groups for microbatch in range(self.num_microbatches)]
        columns = sum(2 * sum(groups) for groups in plans)
        rows = columns - sum(len(groups) for groups in plans)
        calls: list[tuple[Kind, int]] = [("all-reduce", rows)]
        if self.sequence_parallel:
            calls = [("all-gather", columns), ("reduce-scatter", rows)]
        for kind, count in calls:
            yield self._row("layers recomputed", kind, "tp", count, self._hidden_states)

    def _attention(self, stage: int) -> Iterator[Traffic]:
        """Attention over samples that are split over cp: forward, the same where it is recomputed, and backward.

        A ring passes on the other ranks' keys and values both ways, and in backward their gradients until they are
        home. Ulysses has one all-to-all of q, k and v and one of the output, and backward the same.
        """
        cp, layers = self.grid.cp, len(self.stages.layers[stage])
        if cp == 1:
            return
        times, again = layers * self.num_microbatches, 0
        for plan in (self.recompute.at(stage, microbatch) for microbatch in range(self.num_microbatches)):
            again += sum(plan.groups) + (layers - sum(plan.groups)) * ("attention" in plan.modules)
        calls: list[tuple[tuple[Kind, ...], int, int]]  # kinds, how often, bytes of each
        heads, kv_heads = (n // self.grid.tp for n in (self.shape.num_heads, self.shape.num_kv_heads))
        each = self._tokens * self.shape.head_dim * self._item
        if self.context_method == "ring":
            kinds: tuple[Kind, ...] = ("send", "receive")
            calls, wide = [(kinds, cp - 1, 2 * kv_heads * each)], max(4, self._item) // self._item
            for kind in kinds:
                yield self._row("gradients of k and v", kind, "cp", times * cp, 2 * kv_heads * each * wide)
        else:
            calls = [(("all-to-all",), 1, size * each) for size in (heads + 2 * num_shared_heads(kv_heads, cp), heads)]
        for what, count in (("forward", times), ("recomputed", again), ("backward", times)):
            for kind, often, size in ((kind, often, size) for kinds, often, size in calls for kind in kinds):
                yield self._row(f"attention {what}", kind, "cp", count * often, size)

    def _head(self) -> Iterator[Traffic]:
        """The output projection and the loss, where no logits are kept all in forward: x is gathered once.

        Of every token each rank gives two numbers, chunk by chunk; with a max-z loss four.
        """
        num_microbatches, wide = self.num_microbatches, max(4, self._item)
        if self.loss_chunk_tokens == 0:
            yield from self._linears("head", columns=1, rows=0)
            yield self._row("loss: maximum", "all-reduce", "tp", num_microbatches, self._tokens * wide)
            yield self._row("loss: label and sum", "all-reduce", "tp", num_microbatches, 2 * self._tokens * wide)
            if self.shape.max_z_loss > 0:
                what = "loss: largest logit and its count"
                yield self._row(what, "all-reduce", "tp", 2 * num_microbatches, self._tokens * wide)
            return
        hidden_states = self._tokens * self.shape.hidden_size * self._item
        calls: tuple[Kind, ...] = ("all-gather", "reduce-scatter") if self.sequence_parallel else ("all-reduce",)
        for kind in calls:
            yield self._row("head forward", kind, "tp", num_microbatches, hidden_states)
        row_bytes = self.shape.padded_vocab_size // self.grid.tp * self._item
        chunk = loss_chunk_tokens(self._tokens, row_bytes=row_bytes, wanted=self.loss_chunk_tokens)
        chunks = -(-self._tokens // chunk)
        numbers = (4 if self.shape.max_z_loss > 0 else 2) * self.grid.tp * self._tokens * wide
        yield replace(
            self._row("loss: label and sum", "all-gather", "tp", num_microbatches, numbers),
            count=num_microbatches * chunks,
        )

    def _messages(self, stage: int) -> Iterator[Traffic]:
        """Activations to the next stage and their gradients back, where it lives on another rank."""
        message = self._hidden_states // (self.grid.tp if self.sequence_parallel else 1)
        here, last = self.stages.stage_rank[stage], self.stages.num_stages - 1
        neighbours: list[tuple[int, Kind, Kind]] = [(stage - 1, "receive", "send"), (stage + 1, "send", "receive")]
        for neighbour, activation, gradient in neighbours:
            if 0 <= neighbour <= last and self.stages.stage_rank[neighbour] != here:
                yield self._row("activations", activation, "pp", self.num_microbatches, message)
                yield self._row("gradients of activations", gradient, "pp", self.num_microbatches, message)

    def _norm_gradients(self, stages: tuple[int, ...]) -> Iterator[Traffic]:
        """Under sequence parallel each tensor rank has a partial sum of every norm's gradient: all in one call."""
        if self.sequence_parallel:
            norms = sum(2 * len(self.stages.layers[stage]) + self.stages.has_head(stage) for stage in stages)
            yield self._row(
                "gradients of norms", "all-reduce", "tp", 1, norms * self.shape.hidden_size * self._gradient
            )

    def _replicas(self, pp_rank: int) -> Iterator[Traffic]:
        """Gradients summed and weights shared over the replicas, bucket by bucket.

        Where groups of them each have all shards, the sums of a shard are joined over its copies, once a step.
        """
        sharing: GroupName = "dp_cp" if self.grid.num_copies == 1 else "shards"
        first: tuple[Kind, GroupName] = ("reduce-scatter", sharing)
        joined: Kind = "all-reduce"
        if self.deterministic_reduce:
            first, joined = ("all-to-all", "dp_cp"), "all-gather"
        reduced, num_shards = 2 if self.grad_reduce == "bf16" else self._gradient, self.grid.num_shards
        buckets = self._buckets(pp_rank)
        for bucket, (reductions, gathers) in zip(buckets, self._times(pp_rank, buckets), strict=True):
            yield self._row("gradients", *first, reductions, bucket.elements * reduced)
            yield self._row("gradients of copies", joined, "copies", 1, bucket.elements // num_shards * self._gradient)
            yield self._row("weights", "all-gather", sharing, gathers, bucket.elements * self._item)

    def _buckets(self, pp_rank: int) -> list[StageBucket]:
        limit, replicas = self.bucket_bytes // self._gradient, self.grid.size("dp", "cp")
        return rank_buckets(self.shape, self.stages, pp_rank, tp=self.grid.tp, limit=limit, num_shards=replicas)

    def _times(self, pp_rank: int, buckets: Sequence[StageBucket]) -> Iterator[tuple[int, int]]:
        """How often each bucket is reduced and gathered: once, or where it is sharded as the work on it goes."""
        if self.zero == 1:
            yield from ((1, 1) for _ in buckets)
            return
        assert self.order is not None, f"the order of work decides what --zero {self.zero} communicates"
        passes = Passes(
            stages=self.stages,
            recompute=self.recompute,
            keeps_logits=self.loss_chunk_tokens == 0,
            fuse_main_grads=self.fuse_main_grads,
        )
        works = ((stage, work) for op, stage, m in self.order[pp_rank] for work in passes.works(op, stage, m))
        times = calls(works, [bucket for bucket in buckets if bucket.decays], overlap=self.overlap)
        for bucket in buckets:
            reductions, gathers = next(times) if bucket.decays else (1, 1)
            yield reductions, gathers if self.zero == 3 else 1

    def _host(self, pp_rank: int) -> Iterator[Traffic]:
        """The shards that are updated on the host: their gradients go there, and their weights come back."""
        num_shards, sizes = self.grid.num_shards, [bucket.elements for bucket in self._buckets(pp_rank)]
        for size, is_on_host in zip(sizes, on_host(sizes, self.offload_optimizer), strict=True):
            if is_on_host:
                yield self._row("gradients", "to host", "host", 1, size // num_shards * self._gradient)
                yield self._row("weights", "from host", "host", 1, size // num_shards * self._item)

    def _away(self, stage: int) -> Iterator[Traffic]:
        """The activations of layers that wait on the host: there in each forward, and back in each backward."""
        layers = LayerActivations(
            shape=self.shape,
            grid=self.grid,
            micro_batch=self.micro_batch,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_method,
            item=self._item,
            wide=max(4, self._item),
            offloaded=self.offload_activations,
        )
        for microbatch in range(self.num_microbatches):
            again = self.recompute.at(stage, microbatch)
            num_bytes = layers.divided(len(self.stages.layers[stage]), again).away
            if num_bytes > 0:
                yield self._row("activations", "to host", "host", 1, num_bytes)
                yield self._row("activations", "from host", "host", 1, num_bytes)

    def _world(self) -> Iterator[Traffic]:
        """What all ranks agree on, in float64: counts before the step, its norm, loss and tokens of each source."""
        yield self._row("token count", "all-reduce", "world", 1, 4 * 8)
        yield self._row("gradient norm", "all-reduce", "world", 1, 8)
        sums = 3 if self.shape.max_z_loss > 0 else 2
        yield self._row("loss sums", "all-reduce", "world", 1, sums * self.num_sources * 8)

    def _row(self, what: str, kind: Kind, group: GroupName, count: int, each: int) -> Traffic:
        """``count`` calls of ``each`` bytes."""
        size = group_sizes(self.grid)[group]
        return Traffic(what=what, kind=kind, group=group, group_size=size, count=count, num_bytes=count * each)

    @property
    def _hidden_states(self) -> int:
        """Bytes of a microbatch's whole hidden states."""
        return self._tokens * self.shape.hidden_size * self._item

    @property
    def _item(self) -> int:
        """Bytes of a weight or an activation."""
        return ITEM_BYTES[self.precision]

    @property
    def _gradient(self) -> int:
        """Bytes of a main gradient."""
        return GRADIENT_BYTES[self.precision]

    @property
    def _tokens(self) -> int:
        """Tokens of a microbatch on one rank."""
        return self.micro_batch * self.shape.seq_len // self.grid.cp


def group_sizes(grid: RankGrid) -> dict[GroupName, int]:
    """Ranks of every group."""
    return {
        "tp": grid.tp,
        "cp": grid.cp,
        "pp": grid.pp,
        "dp_cp": grid.size("dp", "cp"),
        "shards": grid.num_shards,
        "copies": grid.num_copies,
        "world": grid.world_size,
        "host": 1,
    }


def _merged(rows: Iterator[Traffic]) -> tuple[Traffic, ...]:
    """Rows of the same purpose and kind as one, in the order of the first."""
    merged: dict[tuple[str, Kind], Traffic] = {}
    for row in rows:
        before = merged.get((row.what, row.kind))
        if before is not None:
            row = replace(row, count=before.count + row.count, num_bytes=before.num_bytes + row.num_bytes)
        merged[row.what, row.kind] = row
    return tuple(merged.values())
