"""What follows from the settings and the world size; computed, never written back."""

import math
from dataclasses import dataclass

from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.config.sources import sources, training_blends
from megatron_aquila.plan.batches import BatchPlan
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.layout import layout_layers
from megatron_aquila.plan.memory import MemoryPlan
from megatron_aquila.plan.recompute import MODULES, RecomputePlan, per_stage, plan_recompute
from megatron_aquila.plan.shape import NEEDS_TRAINED_LEN, ModelShape, ffn_size, padded_vocab_size
from megatron_aquila.plan.stages import FIXED_CHUNKS, StagePlan, plan_stages
from megatron_aquila.plan.traffic import TrafficPlan
from megatron_aquila.plan.work import Order


@dataclass(frozen=True, slots=True)
class Derived:
    """The run's grid, model, stages, batches, and what it computes again."""

    grid: RankGrid
    shape: ModelShape
    stages: StagePlan
    batches: BatchPlan
    recompute: RecomputePlan

    def batch_at(self, consumed_samples: int) -> tuple[int, int]:
        """``(global batch, microbatches of a rank)`` of the step that starts after ``consumed_samples``."""
        return self.batches.batch_at(consumed_samples)


def derive(config: RunConfig, world_size: int | None) -> Derived:
    """Everything that ``config`` means on ``world_size`` ranks; ``check`` must have found no problem.

    With the world size unknown, the smallest world that the layout fits.
    """
    return Derived(
        grid=rank_grid(config, world_size),
        shape=(shape := model_shape(config.model)),
        stages=(stages := stage_plan(config.parallel, shape)),
        batches=batch_plan(config, rank_grid(config, world_size).dp),
        recompute=recompute_plan(config.train, stages),
    )


def stage_plan(layout: ParallelConfig, shape: ModelShape) -> StagePlan:
    """The stages, their layers and ranks."""
    return plan_stages(
        shape, layout.pipeline, given_layers(layout), chunks=num_chunks(layout), schedule=layout.schedule
    )


def num_chunks(layout: ParallelConfig) -> int:
    """Stages a rank: as given, as the layout string has, as the schedule needs, or 1."""
    if layout.chunks is not None:
        return layout.chunks
    if layout.pipeline_layout is not None and layout.schedule not in FIXED_CHUNKS:
        return max(1, len(layout_layers(layout.pipeline_layout)) // layout.pipeline)
    return FIXED_CHUNKS.get(layout.schedule, 1)


def given_layers(layout: ParallelConfig) -> tuple[int, ...] | None:
    """Layers of every stage where they are given, in either form. Raises ``LayoutError`` for a string that is none."""
    return layout.stage_layers if layout.pipeline_layout is None else layout_layers(layout.pipeline_layout)


def rank_grid(config: RunConfig, world_size: int | None) -> RankGrid:
    """The grid of ranks; data parallelism takes what the other degrees leave of the world."""
    layout = config.parallel
    model_ranks = layout.tensor * layout.context * layout.pipeline
    if world_size is not None:
        dp, rest = divmod(world_size, model_ranks)
        assert rest == 0, f"a world of {world_size} is not a multiple of {model_ranks}"
    else:
        dp = known_replicas(config)
    return RankGrid(tp=layout.tensor, cp=layout.context, dp=dp, pp=layout.pipeline, zero_group=layout.zero_group)


def known_replicas(config: RunConfig) -> int:
    """Replicas, where the world is not known: dp, or as many as a micro-batch is given for or share out, or 1."""
    layout = config.parallel
    if layout.data is not None:
        return layout.data
    group = 1 if layout.zero_group is None else layout.zero_group
    return max(group // math.gcd(group, layout.context), len(config.train.micro_batch_per_dp))


def model_shape(model: ModelConfig) -> ModelShape:
    """The model's sizes with everything derived filled in."""
    width = model.ffn_size
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_size=ffn_size(model.hidden_size, model.ffn_multiple_of, model.ffn_multiplier) if width is None else width,
        num_heads=model.num_heads,
        num_kv_heads=model.num_heads if model.num_kv_heads is None else model.num_kv_heads,
        head_dim=model.hidden_size // model.num_heads if model.head_dim is None else model.head_dim,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size(model.vocab_size, model.vocab_multiple),
        seq_len=model.seq_len,
        norm_eps=model.norm_eps,
        norm_init=model.norm_init,
        norm_order=model.norm_order,
        init_std=model.init_std,
        rope_base=model.rope_base,
        rope_scaling=model.rope_scaling,
        rope_factor=model.rope_factor,
        rope_trained_len=rope_trained_len(model),
        position_embedding=model.position_embedding,
        score_clamp=model.score_clamp,
        norm_head=model.norm_head,
        max_z_loss=model.max_z_loss,
    )


def rope_trained_len(model: ModelConfig) -> int:
    """Tokens of a sample before rope was stretched: as given, or what the factor leaves; 1 where no form reads it."""
    if model.rope_scaling not in NEEDS_TRAINED_LEN:
        return 1
    return math.ceil(model.seq_len / model.rope_factor) if model.rope_trained_len is None else model.rope_trained_len


def batch_plan(config: RunConfig, dp: int) -> BatchPlan:
    """The batch of every step with ``dp`` replicas."""
    train = config.train
    micro_batches = micro_batches_of(train, dp)
    return BatchPlan(global_batch=train.global_batch, micro_batches=micro_batches, ramp=train.rampup_batch)


def micro_batches_of(train: TrainConfig, dp: int) -> tuple[int, ...]:
    """Samples that each of ``dp`` replicas computes at once."""
    return train.micro_batch_per_dp if train.micro_batch_per_dp else (train.micro_batch,) * dp


def recompute_plan(train: TrainConfig, stages: StagePlan) -> RecomputePlan:
    """What each stage computes again in each microbatch's backward."""
    return plan_recompute(
        stages,
        kind=train.recompute,
        method=train.recompute_method,
        num_layers=train.recompute_layers,
        modules=[module for module in MODULES if module in train.recompute_modules],
        granularities=per_stage(train.recompute_granularity_per_stage),
        methods=per_stage(train.recompute_method_per_stage),
        layers=per_stage(train.recompute_layers_per_stage),
    )


def full_microbatches(derived: Derived) -> int:
    """Microbatches of a rank at the full batch."""
    return derived.batches.num_microbatches(derived.batches.global_batch)


def memory_plan(config: RunConfig, derived: Derived, order: Order, *, micro_batch: int | None = None) -> MemoryPlan:
    """The memory estimate, of a step whose work has this ``order``, of replicas that compute ``micro_batch`` samples at
    once. By default of those that compute the most.
    """
    return MemoryPlan(
        shape=derived.shape,
        grid=derived.grid,
        stages=derived.stages,
        micro_batch=max(derived.batches.micro_batches) if micro_batch is None else micro_batch,
        order=order,
        sequence_parallel=config.parallel.sequence,
        context_method=config.parallel.context_method,
        precision=config.train.precision,
        optimizer=config.optim.optimizer,
        moments_dtype=config.optim.moments_dtype,
        master_weights=config.optim.master_weights,
        bucket_bytes=bucket_bytes(config),
        grad_reduce=config.parallel.grad_reduce,
        deterministic_reduce=config.parallel.deterministic_reduce,
        overlap=config.parallel.overlap,
        recompute=derived.recompute,
        fuse_main_grads=config.parallel.fuse_main_grads,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        offload_optimizer=config.optim.offload_optimizer,
        offload_activations=config.train.offload_activations,
        pinned=config.train.device != "cpu",
        zero=config.parallel.zero,
    )


def bucket_bytes(config: RunConfig) -> int:
    """Bytes of main gradients that a bucket holds."""
    return math.ceil(config.parallel.bucket_mib * 2**20)


def traffic_plan(
    config: RunConfig, derived: Derived, order: Order | None = None, *, micro_batch: int | None = None
) -> TrafficPlan:
    """The communication of a step at the run's full batch, of replicas as ``memory_plan`` takes them.

    With ``--zero 2`` or 3 of a run whose work has this ``order``.
    """
    return TrafficPlan(
        shape=derived.shape,
        grid=derived.grid,
        stages=derived.stages,
        micro_batch=max(derived.batches.micro_batches) if micro_batch is None else micro_batch,
        num_microbatches=full_microbatches(derived),
        sequence_parallel=config.parallel.sequence,
        context_method=config.parallel.context_method,
        precision=config.train.precision,
        bucket_bytes=bucket_bytes(config),
        grad_reduce=config.parallel.grad_reduce,
        deterministic_reduce=config.parallel.deterministic_reduce,
        recompute=derived.recompute,
        num_sources=max(1, len(sources(*(path for _, path in training_blends(config.data))))),
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        offload_optimizer=config.optim.offload_optimizer,
        offload_activations=config.train.offload_activations,
        zero=config.parallel.zero,
        overlap=config.parallel.overlap,
        fuse_main_grads=config.parallel.fuse_main_grads,
        order=order,
    )
