"""From settings to a run: one line a part. The rooms of the layer below meet here and nowhere else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.config.derive import Derived, bucket_bytes
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.data.loader import MicroBatch
from megatron_aquila.kernels.attention_blocks import ScoreBlocks
from megatron_aquila.kernels.blocks import BlockAttention
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.ops import Kernels
from megatron_aquila.kernels.products import NATIVE, Products, fp8_products
from megatron_aquila.kernels.self_check import Sizes
from megatron_aquila.model.aquila import AquilaStage, build_stages
from megatron_aquila.model.offload import HostActivations
from megatron_aquila.model.position import rank_scores
from megatron_aquila.optim.buckets import Reduction, Sharding, Storage
from megatron_aquila.optim.distributed import DistributedOptimizer, Offload
from megatron_aquila.optim.lr import LrSchedule
from megatron_aquila.optim.rules import AdamW, Rule, Sgd
from megatron_aquila.optim.scaler import LossScaling
from megatron_aquila.optim.trained import freeze_others
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import gather_objects
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.trail import SILENT, Trail
from megatron_aquila.parallel.ulysses import UlyssesAttention
from megatron_aquila.parallel.weight_grads import WeightGradQueue
from megatron_aquila.pipeline.action import Program
from megatron_aquila.pipeline.checks import check, needed_link_depth
from megatron_aquila.pipeline.engine import Engine, LossFn
from megatron_aquila.pipeline.schedules import build_schedule, forward_only
from megatron_aquila.pipeline.wire import P2PWire, Wire
from megatron_aquila.plan.sequence import ContextMethod, num_shared_heads, shard_pieces
from megatron_aquila.plan.shape import ModelShape, Precision
from megatron_aquila.train.graphs import CudaCapture, Runner, StepGraph, at_once

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What computes: everything of a run but its data and its past."""

    config: RunConfig
    derived: Derived
    ctx: ParallelContext
    kernels: Kernels
    stages: dict[int, AquilaStage]
    infos: tuple[ParamInfo, ...]
    wire: Wire
    weight_grads: WeightGradQueue
    optimizer: DistributedOptimizer
    lr: LrSchedule
    scaling: LossScaling
    programs: Mapping[int, Program]  # this pipeline rank's work for a step, by number of microbatches
    runner: Runner = at_once  # how a step's forward and backward are launched

    def engine(self, loss_fn: LossFn) -> Engine:
        """The engine over this rank's stages, for one step's loss."""
        return Engine(
            self.stages,
            num_stages=self.derived.stages.num_stages,
            loss_fn=loss_fn,
            wire=self.wire,
            weight_grads=self.weight_grads,
        )

    def forward_program(self, num_microbatches: int) -> Program:
        """This pipeline rank's forward work, for a validation."""
        return forward_only(self.derived.stages.stage_rank, num_microbatches)[self.ctx.pp.rank]


def create_context(config: RunConfig, derived: Derived, device: torch.device, trail: Trail = SILENT) -> ParallelContext:
    """This process's place among the ranks, and its groups; ``trail`` is told what they transfer. Collective."""
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    return ParallelContext.create(derived.grid, device, timeout, pp_turns_back=derived.stages.turns_back, trail=trail)


def build_machine(
    config: RunConfig, derived: Derived, ctx: ParallelContext, *, kernels: Kernels | None = None
) -> Machine:
    """Kernels, stages, optimizer, wire and programs. Weights are allocated, not filled.

    ``kernels`` are by default the best that run on every rank's device, or those that the settings name: chosen with an
    all-gather over the world, so that replicas round alike. All else is local.
    """
    chosen = run_kernels(config, derived.shape, ctx) if kernels is None else kernels
    kernels = split_attention(chosen, ctx.cp, method=config.parallel.context_method, overlap=config.parallel.overlap)
    placement = Placement(
        tp=ctx.tp,
        sequence_parallel=config.parallel.sequence,
        dtype=DTYPES[config.train.precision],
        device=ctx.device,
        overlap=config.parallel.overlap,
        products=run_products(config, ctx),
        has_memory=config.parallel.zero < 3 or config.optim.train_only is not None,
    )
    stages = build_stages(
        derived.shape,
        derived.stages,
        pp_rank=ctx.pp.rank,
        placement=placement,
        kernels=kernels,
        recompute=derived.recompute,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        host=host_activations(config.train, ctx.device),
    )
    infos = tuple(info for stage in stages.values() for info in stage.param_infos())
    optimizer = DistributedOptimizer(
        freeze_others(infos, config.optim.train_only),
        ctx,
        rule=update_rule(config.optim, kernels),
        bucket_bytes=bucket_bytes(config),
        reduction=reduction(config.parallel),
        storage=storage(config.optim),
        sharding=Sharding(gradients=config.parallel.zero >= 2, weights=config.parallel.zero >= 3),
        offload=offload(config.optim, kernels, ctx),
    )
    connect(config.parallel, placement, stages.values(), optimizer)
    plan = plan_work(config, derived, ctx.pp.rank)
    return Machine(
        config=config,
        derived=derived,
        ctx=ctx,
        kernels=kernels,
        stages=stages,
        infos=infos,
        wire=build_wire(config, derived, ctx, link_depth=plan.link_depth),
        weight_grads=placement.weight_grads,
        optimizer=optimizer,
        lr=lr_schedule(config),
        scaling=loss_scaling(config),
        programs=plan.programs,
        runner=step_runner(config.train, ctx, optimizer),
    )


def run_kernels(config: RunConfig, shape: ModelShape, ctx: ParallelContext) -> Kernels:
    """The best kernels that run on every rank, or those that the settings name. All-gathers over the world."""
    return choose_kernels(
        ctx.device,
        DTYPES[config.train.precision],
        forced=dict(split_choice(word) for word in config.train.kernels),
        sizes=run_kernel_sizes(config, shape, ctx),
        share=lambda mine: gather_objects(mine, ctx.world),
    )


def split_attention(kernels: Kernels, cp: Group, *, method: ContextMethod, overlap: bool) -> Kernels:
    """The kernels with an attention whose tokens are split over cp, made of the one that they have."""
    if cp.size == 1:
        return kernels
    if method == "ulysses":
        return replace(kernels, attention=UlyssesAttention(cp=cp, attention=kernels.attention))
    kernel = kernels.attention
    assert isinstance(kernel, BlockAttention | ScoreBlocks), f"a ring needs attention by blocks, not {kernel}"
    return replace(kernels, attention=RingAttention(cp=cp, kernel=kernel, overlap=overlap))


def run_products(config: RunConfig, ctx: ParallelContext) -> Products:
    """How the blocks' linears multiply. What one rank's device cannot do is refused on all, by two all-gathers."""
    if config.train.precision != "fp8":
        return NATIVE
    return agreed(lambda: fp8_products(ctx.device), ctx.world)


def run_kernel_sizes(config: RunConfig, shape: ModelShape, ctx: ParallelContext) -> Sizes:
    """What this rank's kernels are tried at in a run."""
    has_documents = config.data.reset_attention_mask
    return kernel_sizes(shape, ctx, method=config.parallel.context_method, has_documents=has_documents)


def kernel_sizes(shape: ModelShape, ctx: ParallelContext, *, method: ContextMethod, has_documents: bool) -> Sizes:
    """What this rank's kernels are tried at, where cp's ranks attend by ``method``."""
    num_heads, num_kv_heads = shape.num_heads // ctx.tp.size, shape.num_kv_heads // ctx.tp.size
    scores = rank_scores(shape, ctx.tp)
    is_ring = ctx.cp.size > 1 and method == "ring"
    if ctx.cp.size > 1 and not is_ring:
        num_heads, num_kv_heads = (n // ctx.cp.size for n in (num_heads, num_shared_heads(num_kv_heads, ctx.cp.size)))
        scores = None if scores is None else scores.share(ctx.cp.rank, ctx.cp.size)
    return Sizes(
        hidden_size=shape.hidden_size,
        ffn_size=shape.ffn_size // ctx.tp.size,
        head_dim=shape.head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seq_len=shape.seq_len,
        has_documents=has_documents,
        by_blocks=is_ring or shape.rope_scaling == "two-range",
        norm_order=shape.norm_order,
        interleaved=shape.position_embedding == "rope-interleaved",
        scores=scores,
    )


def build_wire(config: RunConfig, derived: Derived, ctx: ParallelContext, *, link_depth: int) -> P2PWire:
    """What activations and their gradients travel over, of this rank's part of a microbatch's sequence."""
    rows = derived.shape.seq_len // ctx.cp.size // (ctx.tp.size if config.parallel.sequence else 1)
    return P2PWire(
        ctx,
        stage_rank=derived.stages.stage_rank,
        activation_shape=(rows, derived.batches.micro_batch_of(ctx.dp.rank), derived.shape.hidden_size),
        dtype=DTYPES[config.train.precision],
        depth=link_depth,
        overlap=config.parallel.overlap,
    )


def reduction(parallel: ParallelConfig) -> Reduction:
    """How gradients are summed over the replicas."""
    return Reduction(
        dtype=torch.bfloat16 if parallel.grad_reduce == "bf16" else None,
        in_rank_order=parallel.deterministic_reduce,
        overlap=parallel.overlap,
    )


def storage(optim: OptimConfig) -> Storage:
    """How masters and moments are kept between steps."""
    return Storage(
        moments=torch.bfloat16 if optim.moments_dtype == "bf16" else None,
        has_remainders=optim.master_weights == "remainder",
    )


def offload(optim: OptimConfig, kernels: Kernels, ctx: ParallelContext) -> Offload | None:
    """What of the optimizer is on the host, and its rule there. Beside a GPU all-gathers over the world: the best
    kernel that runs on every rank's host."""
    if optim.offload_optimizer == 0:
        return None
    if ctx.device.type == "cuda":
        host = choose_kernels(torch.device("cpu"), torch.float32, share=lambda mine: gather_objects(mine, ctx.world))
        kernels = replace(kernels, adamw=host.adamw)
    return Offload(share=optim.offload_optimizer, rule=update_rule(optim, kernels))


def host_activations(train: TrainConfig, device: torch.device) -> HostActivations | None:
    """Where the activations of so many layers wait for their backward: on the host; None where all stay."""
    return HostActivations(device, wanted=train.offload_activations) if train.offload_activations > 0 else None


def connect(
    parallel: ParallelConfig, placement: Placement, stages: Iterable[nn.Module], optimizer: DistributedOptimizer
) -> None:
    """Let the layers wait for the optimizer's weights, and hand it their gradients."""
    if parallel.zero >= 3:
        placement.weight_reads.announce_to(lambda weight: optimizer.wait_for_weights([weight]))
    if parallel.fuse_main_grads:
        placement.weight_grads.accumulate_into(optimizer.main_grads())
    wait_before_forward(stages, optimizer)


def step_runner(train: TrainConfig, ctx: ParallelContext, optimizer: DistributedOptimizer) -> Runner:
    """How steps are launched: recorded where that is asked for and the device is a GPU."""
    if train.cuda_graph and ctx.device.type == "cuda":
        return StepGraph(CudaCapture(ctx.device), settle=optimizer.settle, world=ctx.host_world)
    return at_once


def wait_before_forward(stages: Iterable[nn.Module], optimizer: DistributedOptimizer) -> None:
    """Let every module, before its forward, wait for the weights it holds itself: they may still be on their way."""

    def wait(module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        optimizer.wait_for_weights(module.parameters(recurse=False))

    for stage in stages:
        for module in stage.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(wait)


def split_choice(word: str) -> tuple[str, str]:
    """``op=name`` in two."""
    op, _, name = word.partition("=")
    return op, name


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """One pipeline rank's programs by number of microbatches, and the messages that a link holds while they run."""

    programs: Mapping[int, Program]
    link_depth: int


def plan_work(config: RunConfig, derived: Derived, pp_rank: int) -> WorkPlan:
    """One pipeline rank's work for every number of microbatches that the batch ramp passes through, each proved.

    Every schedule exists for every number, so that none has a stand-in. Where stages turn back, a validation's forwards
    need links of two messages whatever the batches need.
    """
    stages = derived.stages
    programs, link_depth = {}, 2 if stages.turns_back else 1
    for batch in derived.batches.sizes():
        num_microbatches = derived.batches.num_microbatches(batch)
        schedule = build_schedule(config.parallel.schedule, derived.grid.pp, num_microbatches, stages.chunks)
        link_depth = max(link_depth, needed_link_depth(schedule, stages.num_stages))
        check(schedule, stages.num_stages, num_microbatches, link_depth=link_depth)
        programs[num_microbatches] = schedule[pp_rank]
    return WorkPlan(programs, link_depth)


def update_rule(optim: OptimConfig, kernels: Kernels) -> Rule:
    """The update rule the settings name."""
    if optim.optimizer == "sgd":
        return Sgd(weight_decay=optim.weight_decay)
    return AdamW(
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        kernel=kernels.adamw,
    )


def lr_schedule(config: RunConfig) -> LrSchedule:
    """The learning rate as a function of consumed samples."""
    optim = config.optim
    decay_samples = optim.lr_decay_samples
    return LrSchedule(
        peak=optim.lr,
        minimum=optim.min_lr,
        warmup_samples=optim.lr_warmup_samples,
        decay_samples=decay_samples if decay_samples is not None else config.train.train_samples,
        decay=optim.lr_decay,
        wsd_decay_samples=optim.lr_wsd_decay_samples,
        wsd_decay=optim.lr_wsd_decay,
    )


def loss_scaling(config: RunConfig) -> LossScaling:
    """How the loss is scaled before it is differentiated: in fp16 as set, else by 1."""
    optim = config.optim
    if config.train.precision != "fp16":
        return LossScaling.constant()
    if optim.loss_scale is not None:
        return LossScaling.constant(optim.loss_scale)
    return LossScaling(
        initial=optim.initial_loss_scale,
        minimum=optim.min_loss_scale,
        window=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
    )


def context_pieces(parallel: ParallelConfig, shape: ModelShape, cp: Group) -> tuple[range, ...]:
    """The places of a sample whose tokens this rank holds."""
    return shard_pieces(shape.seq_len, cp=cp.size, rank=cp.rank, method=parallel.context_method)


def host_batch(
    micro: MicroBatch, number: int = 0, *, pieces: tuple[range, ...] | None = None, pinned: bool = False
) -> Batch:
    """A microbatch, the step's ``number``-th, as tensors on the host, of the tokens in ``pieces`` (None: all).

    Its documents are those of the whole samples. ``pinned``: in memory that a GPU reads by itself. This copies, and may
    wait for the driver, so a loader's thread does it.
    """

    def tensor(values: NDArray[Any]) -> Tensor:
        found = torch.from_numpy(values)
        return found.pin_memory() if pinned else found

    def of_tokens(values_BS: NDArray[Any]) -> Tensor:
        if pieces is None or sum(map(len, pieces)) == values_BS.shape[1]:
            return tensor(values_BS)
        return tensor(np.concatenate([values_BS[:, piece.start : piece.stop] for piece in pieces], axis=1))

    bounds = micro.document_bounds
    return Batch(
        tokens_BS=of_tokens(micro.tokens_BS),
        labels_BS=of_tokens(micro.labels_BS),
        loss_mask_BS=of_tokens(micro.loss_mask_BS),
        positions_BS=of_tokens(micro.positions_BS),
        source_B=tensor(micro.source_B),
        documents=None if bounds is None else Documents(tuple(bounds.tolist()), tensor(bounds)),
        microbatch=number,
    )
