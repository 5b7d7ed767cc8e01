"""Memory of one rank before anything is allocated: what it keeps from step to step, and beside that the fullest moment
of a walk through its work.

Tests trace whole steps, of the recipes too, and find the total. Not in it: the device's own context, NCCL's buffers and
fragmentation (2 to 4 GiB of a GPU in practice), and the tokens of a step, 28 bytes each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_aquila.plan.buckets import StageBucket, rank_buckets, stage_parameters
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.moments import StageBytes
from megatron_aquila.plan.offload import HostMemory, on_host, pinned_bytes
from megatron_aquila.plan.recompute import KEEP_ALL, RecomputePlan
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.shape import ModelShape, Precision
from megatron_aquila.plan.stages import StagePlan
from megatron_aquila.plan.walk import Walk
from megatron_aquila.plan.work import Order, Passes

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
    activations: int = 0
    logits: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the estimate needs beside the shape; every count of tokens is ``micro_batch * shape.seq_len / cp``.

    ``order``: a step's work, as the schedule says. ``pinned``: what travels between host and device is so on the host.
    """

    shape: ModelShape
    grid: RankGrid
    stages: StagePlan
    micro_batch: int
    order: Order
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

    def of_rank(self, rank: int) -> Memory:
        """Bytes of pipeline rank ``rank``, of all its stages, at the fullest moment of a step."""
        kept, fullest = self.between_steps(rank), self._walk(rank).fullest(self.order[rank])
        return replace(
            kept,
            weights=kept.weights + fullest.weights,
            main_grads=kept.main_grads + fullest.main_grads,
            activations=fullest.activations,
            logits=fullest.logits,
            temporaries=fullest.temporaries + self._copies(self._reduced_at_once(rank)),
        )

    def between_steps(self, rank: int) -> Memory:
        """Bytes that pipeline rank ``rank`` keeps from step to step: of what ZeRO shards its shards alone."""
        buckets = self._buckets(rank)
        # those whose masters and states are not on the host
        shard = sum(bucket.elements for bucket in buckets) // self.grid.num_shards - sum(self._offloaded(rank))
        return Memory(
            weights=self._held(buckets, from_level=3) * self._item,
            main_grads=self._held(buckets, from_level=2) * GRADIENT_BYTES[self.precision],
            master_weights=shard * self._master,
            optimizer_states=shard * self._moments,
        )

    def activations_of_rank(self, rank: int) -> int:
        """Bytes that pipeline rank ``rank`` keeps for backwards and weight gradients at its fullest, but for logits.

        That may be another moment than ``of_rank``'s.
        """
        return self._walk(rank).fullest(self.order[rank], by=lambda moment: moment.activations).activations

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

    def stage_params(self, stage: int) -> int:
        """Elements of this rank's shard of the stage, padded rows included; norms are whole on every rank."""
        return sum(parameter.elements for parameter in stage_parameters(self.shape, self.stages, stage, self.grid.tp))

    def _held(self, buckets: Sequence[StageBucket], *, from_level: int) -> int:
        """Elements of weights (``from_level`` 3) or gradients (2) between steps: all, or from that level of ZeRO on
        norms and the rank's shard of the matrices.
        """
        sharded = sum(bucket.elements for bucket in self._sharded(buckets, from_level=from_level))
        return sum(bucket.elements for bucket in buckets) - sharded + sharded // self.grid.num_shards

    def _sharded(self, buckets: Sequence[StageBucket], *, from_level: int) -> list[StageBucket]:
        """Those of which the rank keeps a shard alone, of weights or gradients as ``_held`` takes them."""
        return [bucket for bucket in buckets if bucket.decays and self.zero >= from_level]

    def _walk(self, rank: int) -> Walk:
        buckets = self._buckets(rank)
        return Walk(
            passes=Passes(
                stages=self.stages,
                recompute=self.recompute,
                keeps_logits=self.loss_chunk_tokens == 0,
                fuse_main_grads=self.fuse_main_grads,
            ),
            sizes=self._sizes,
            sharded_weights=self._sharded(buckets, from_level=3),
            sharded_grads=self._sharded(buckets, from_level=2),
            num_pieces=self.grid.num_pieces(in_rank_order=self.deterministic_reduce),
            gradient=GRADIENT_BYTES[self.precision],
            copied=self._copies,
            overlap=self.overlap,
        )

    @property
    def _sizes(self) -> StageBytes:
        return StageBytes(
            shape=self.shape,
            grid=self.grid,
            stages=self.stages,
            micro_batch=self.micro_batch,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_method,
            item=self._item,
            wide=max(4, self._item),
            loss_chunk_tokens=self.loss_chunk_tokens,
            fuse_main_grads=self.fuse_main_grads,
            offloaded=self.offload_activations,
            pinned=self.pinned,
        )

    def _reduced_at_once(self, rank: int) -> int:
        """Elements of whole sums that are reduced at once, of those that are not sharded: with overlap two buckets."""
        whole = [bucket.elements for bucket in self._buckets(rank) if self.zero == 1 or not bucket.decays]
        return max(whole, default=0) * (2 if self.overlap else 1)  # none where a stage is the embedding alone

    def _copies(self, elements: int) -> int:
        """Bytes that a reduction of so many elements holds until it is done, where it is not in place: what travels and
        what comes. In rank order over groups its pieces are laid out anew.
        """
        num_pieces = self.grid.num_pieces(in_rank_order=self.deterministic_reduce)
        if num_pieces == 1:
            return 0
        is_narrow, in_order = self.grad_reduce == "bf16", self.deterministic_reduce
        is_cut = in_order and self.grid.num_shards > 1 < self.grid.num_copies
        travels = elements * (2 if is_narrow else GRADIENT_BYTES[self.precision])
        comes = travels if in_order else travels // num_pieces * is_narrow
        return travels * (is_narrow or is_cut) + comes

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

    def _away(self, rank: int) -> int:
        """Bytes of activations on the host at its fullest: of what is in flight but not yet back for its I or B."""
        away = most = 0
        for op, stage, microbatch in self.order[rank]:
            taken = self._sizes.divided(stage, self.recompute.at(stage, microbatch)).taken
            away += taken * {"F": 1, "B": -1, "I": -1, "W": 0}[op]
            most = max(most, away)
        return most
