"""A model that is used: its stages on this rank, and forward passes through the pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.checkpoint.layout import param_chunks
from megatron_aquila.config.context import head_problems
from megatron_aquila.errors import Problem, refuse
from megatron_aquila.generate.source import Source
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.ops import CausalAttention
from megatron_aquila.model.aquila import AquilaStage, Head, build_stages
from megatron_aquila.model.cache import KVCache
from megatron_aquila.model.position import attention_of, rank_scores
from megatron_aquila.model.split_cache import SplitCache
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import all_gather, gather_objects
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.pipeline.engine import Engine, LossFn, Stage
from megatron_aquila.pipeline.schedules import forward_only
from megatron_aquila.pipeline.wire import P2PWire
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.sequence import ContextMethod, num_pieces, shard_pieces
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import StagePlan, plan_stages
from megatron_aquila.train.build import kernel_sizes, split_attention
from megatron_aquila.train.masters import read_weights

Cache = KVCache | SplitCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a model that is used is split: the degrees, and how the ranks of cp, which share every row, attend."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    cp_method: ContextMethod = "ring"

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one model."""
        return self.tp * self.cp * self.pp


def layout_problems(shape: ModelShape, layout: Layout, *, world_size: int, replicates: bool) -> list[Problem]:
    """Why the model cannot be split so over the processes there are; ``replicates``: several may do the same."""
    tp, cp, pp = layout.tp, layout.cp, layout.pp
    degrees = {"--tp": tp, "--cp": cp, "--pp": pp}
    if problems := [Problem(flag, n, "it must be positive", "use 1 or more") for flag, n in degrees.items() if n < 1]:
        return problems
    for name in ("num_heads", "num_kv_heads", "ffn_size"):
        if getattr(shape, name) % tp:
            why = f"the model's {name} {getattr(shape, name)} is not divisible by it"
            problems.append(Problem("--tp", tp, why, "use a divisor"))
    if layout.cp_method == "ulysses":
        problems += head_problems(shape.num_heads, tp=tp, cp=cp, world=world_size)
    if pp > shape.num_layers:
        problems.append(Problem("--pp", pp, f"the model has {shape.num_layers} layers", "use fewer stages"))
    needed = layout.model_ranks
    if world_size % needed or (world_size != needed and not replicates):
        why = f"there are {world_size} processes, not {needed}"
        way_out = f"start torchrun with --nproc-per-node {needed}, or choose others"
        problems.append(Problem("--tp x --cp x --pp", f"{tp} x {cp} x {pp}", why, way_out))
    return problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """This rank's stages of a model with its weights. Everything here runs without gradients.

    The ranks of cp share the tokens of every row as in training: a batch holds those of one rank.
    """

    ctx: ParallelContext
    cp_method: ContextMethod
    shape: ModelShape
    plan: StagePlan
    dtype: torch.dtype
    attention: CausalAttention
    stages: Mapping[int, AquilaStage]

    @property
    def is_last(self) -> bool:
        """Whether this rank has the head."""
        return self.plan.num_stages - 1 in self.stages

    def splittable(self, length: int) -> int:
        """``length``, or as many more as it takes for cp to share them. What is added is padding."""
        pieces = num_pieces(self.ctx.cp.size, self.cp_method)
        return -(-length // pieces) * pieces

    def places(self, length: int) -> Tensor:
        """Which of the ``length`` tokens of a row this rank computes, ascending."""
        cp = self.ctx.cp
        pieces = shard_pieces(length, cp=cp.size, rank=cp.rank, method=self.cp_method)
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])

    def forward(self, batches: list[Batch], stages: Mapping[int, Stage], take: LossFn, *, length: int) -> None:
        """Send ``batches``, each of ``length`` tokens a row, through the model; ``take`` sees what the last stage made.

        Communicates: an activation to the next stage, each batch; what the stages do, over tp and cp.
        """
        wire = P2PWire(
            self.ctx,
            stage_rank=self.plan.stage_rank,
            activation_shape=(length, batches[0].tokens_BS.shape[0], self.shape.hidden_size),
            dtype=self.dtype,
        )
        engine = Engine(stages, num_stages=self.plan.num_stages, loss_fn=take, wire=wire)
        engine.evaluate(forward_only(self.plan.stage_rank, len(batches))[self.ctx.pp.rank], batches)

    def new_caches(self, capacity: int, padding_B: Tensor) -> dict[int, Cache]:
        """An empty cache for each of this rank's stages."""
        cp, scores = self.ctx.cp, rank_scores(self.shape, self.ctx.tp)
        make: Callable[..., Cache] = KVCache
        if cp.size > 1:
            make = partial(SplitCache, cp=cp, method=self.cp_method, attention=self.attention)
        return {
            number: make(len(stage.layers), capacity, padding_B, scores=scores) for number, stage in self.stages.items()
        }

    def last_logits(self, tokens_BS: Tensor, caches: Mapping[int, Cache]) -> Tensor | None:
        """logits_BV, in float32 or wider, of what follows ``tokens_BS``, which the caches then hold too.

        None but on the ranks of the last stage. The first time there are as many tokens as cp can share. Communicates:
        activations between stages, what the caches do over cp, and on the last stage all-gathers of the last token's
        output over cp, and of the logits over tp.
        """
        positions_BS, *_ = [cache.extend(tokens_BS.shape[1]) for cache in caches.values()]
        chosen, *_ = [cache.chosen for cache in caches.values()]
        found: list[Tensor] = []

        def with_cache(number: int) -> Stage:
            stage, cores = self.stages[number], caches[number].layers
            return lambda x, batch: stage.infer(
                x, batch.tokens_BS, batch.positions_BS, ending=self._last_of_each_row, cores=cores
            )

        def take(logits_1BVt: Tensor, _batch: Batch) -> Tensor:
            parts = all_gather(logits_1BVt, self.ctx.tp).unbind(0)  # one after the other, along the vocabulary
            logits_BV = torch.cat(parts, dim=-1)[:, : self.shape.vocab_size]
            found.append(logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)))
            return found[0]

        stages = {number: with_cache(number) for number in self.stages}
        self.forward([plain_batch(tokens_BS[:, chosen], positions_BS)], stages, take, length=positions_BS.shape[1])
        return found[0] if found else None

    def _last_of_each_row(self, head: Head, x_SBH: Tensor) -> Tensor:
        """logits_1BVt of the last token, by the rank of cp that has it, on all of them."""
        rank = 0 if self.cp_method == "ring" else self.ctx.cp.size - 1
        return head.logits(all_gather(x_SBH[-1:], self.ctx.cp)[rank : rank + 1])

    def share(self, numbers: list[int] | None) -> list[int]:
        """What the last stage's ranks have, on every rank of the pipeline, which knows how many numbers there are.

        Communicates: an all-gather of small values over pp.
        """
        (found,) = [mine for mine in gather_objects(numbers, self.ctx.pp) if mine is not None]
        shared: list[int] = found
        return shared


def plain_batch(tokens_BS: Tensor, positions_BS: Tensor, labels_BS: Tensor | None = None) -> Batch:
    """Tokens as the stages take them, one document a row."""
    rows = torch.zeros(tokens_BS.shape[0], dtype=torch.int64, device=tokens_BS.device)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS if labels_BS is None else labels_BS,
        loss_mask_BS=torch.ones_like(tokens_BS, dtype=torch.float32),
        positions_BS=positions_BS,
        source_B=rows,
    )


def create_context(layout: Layout, device: torch.device, world_size: int, timeout: timedelta) -> ParallelContext:
    """Groups for tp x cp x pp, the rest of the world as replicas. Collective."""
    dp = world_size // layout.model_ranks
    return ParallelContext.create(RankGrid(tp=layout.tp, cp=layout.cp, pp=layout.pp, dp=dp), device, timeout)


def build_runner(
    source: Source, ctx: ParallelContext, *, cp_method: ContextMethod = "ring", dtype: torch.dtype | None = None
) -> Runner:
    """The model of ``source`` split as ``ctx`` says, its weights read. Collective over the world.

    ``dtype`` None: as stored.

    Raises:
        ConfigError: it cannot be split so.
        CheckpointError: a file is missing or damaged, on every rank.
    """
    shape, dtype = source.shape, source.dtype if dtype is None else dtype
    grid = ctx.grid
    layout = Layout(tp=grid.tp, cp=grid.cp, pp=grid.pp, cp_method=cp_method)
    refuse(layout_problems(shape, layout, world_size=grid.world_size, replicates=True))
    has_documents = ctx.cp.size > 1  # the padding of prompts is one
    sizes = kernel_sizes(shape, ctx, method=cp_method, has_documents=has_documents)
    kernels = choose_kernels(ctx.device, dtype, sizes=sizes, share=lambda mine: gather_objects(mine, ctx.world))
    kernels = split_attention(kernels, ctx.cp, method=cp_method, overlap=True)
    placement = Placement(tp=ctx.tp, sequence_parallel=False, dtype=dtype, device=ctx.device)
    plan = plan_stages(shape, grid.pp)
    with torch.no_grad():
        stages = build_stages(shape, plan, pp_rank=ctx.pp.rank, placement=placement, kernels=kernels)
        infos = [info for stage in stages.values() for info in stage.param_infos()]
        for info in infos:
            info.param.requires_grad_(False).zero_()  # padded rows are in no file
        chunks = [chunk for info in infos for chunk in param_chunks(info)]
        agreed(lambda: read_weights(source.reader, chunks, with_remainders=False, cast=True), ctx.world)
    return Runner(
        ctx=ctx,
        cp_method=cp_method,
        shape=shape,
        plan=plan,
        dtype=dtype,
        attention=attention_of(shape, kernels, ctx.tp),
        stages=stages,
    )
