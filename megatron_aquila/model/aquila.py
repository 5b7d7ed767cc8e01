"""Aquila, cut into pipeline stages. Logical parameter names are those of Hugging Face's Llama."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from typing import cast

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.ops import CausalAttention, Kernels
from megatron_aquila.kernels.precision import compute_dtype
from megatron_aquila.model.block import Block, recomputed
from megatron_aquila.model.norm import RMSNorm
from megatron_aquila.model.offload import HostActivations, Unit
from megatron_aquila.model.position import position_tables
from megatron_aquila.model.recompute import feed
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.params import Normal, ParamInfo, vocab_part
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab import VocabParallelEmbedding
from megatron_aquila.parallel.vocab_loss import VocabParallelOutput
from megatron_aquila.plan.recompute import KEEP_ALL, NO_MODULES, Module, Recompute, RecomputePlan
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import StagePlan


class AquilaStage(nn.Module):
    """The layers of one pipeline stage; the first also embeds, the last also norms, projects and takes the loss."""

    def __init__(
        self,
        shape: ModelShape,
        plan: StagePlan,
        stage: int,
        *,
        placement: Placement,
        kernels: Kernels,
        recompute: RecomputePlan = KEEP_ALL,
        loss_chunk_tokens: int | None = None,
        host: HostActivations | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.stage, self.tp, self.recompute, self.host = shape, stage, placement.tp, recompute, host
        self.layers = plan.layers[stage]
        self.embedding = (
            VocabParallelEmbedding(
                shape.vocab_size,
                shape.padded_vocab_size,
                shape.hidden_size,
                placement=placement,
            )
            if plan.has_embedding(stage)
            else None
        )
        self.blocks = nn.ModuleList(Block(shape, placement=placement, kernels=kernels) for _ in self.layers)
        self.head = (
            Head(shape, placement=placement, kernels=kernels, loss_chunk_tokens=loss_chunk_tokens)
            if plan.has_head(stage)
            else None
        )

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        """The previous stage's x_StBH | x_SBH (None on the first) -> this stage's, or the last one's loss_SB.

        ``loss_SB`` holds every token's negative log-likelihood in nats, unmasked, in at least fp32. With a max-z loss
        the last stage gives (2, S, B): beside it what is added to each token's.
        """
        recompute = self.recompute.at(self.stage, batch.microbatch)
        x = self._blocks(x, batch.tokens_BS, batch.positions_BS, batch.documents, recompute)
        if self.head is None:
            return x
        loss: Tensor = self.head(x, batch, recompute.modules)
        return loss

    def logits(self, x: Tensor | None, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Like ``forward`` on the last stage, but logits_SBVt instead of the loss."""
        assert self.head is not None, f"stage {self.stage} has no head"
        return self.head.logits(self._blocks(x, tokens_BS, positions_BS))

    def infer(
        self,
        x: Tensor | None,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        *,
        ending: "Callable[[Head, Tensor], Tensor]",
        cores: Sequence[CausalAttention] | None = None,
    ) -> Tensor:
        """Like ``forward``, but on the last stage ``ending`` makes of the head and x_SBH what is wanted.

        ``cores``: what attends in each of this stage's layers, a cache of what earlier calls saw. Not under sequence
        parallel.
        """
        x_SBH = self._blocks(x, tokens_BS, positions_BS, cores=cores)
        return x_SBH if self.head is None else ending(self.head, x_SBH)

    def _blocks(
        self,
        x: Tensor | None,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        documents: Documents | None = None,
        recompute: Recompute = Recompute(),
        cores: Sequence[CausalAttention] | None = None,
    ) -> Tensor:
        assert (x is None) == (self.embedding is not None), f"stage {self.stage} got x={x is not None}"
        if self.embedding is not None:
            x = self.embedding(tokens_BS)
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()  # it is not trained; what comes after it still has a graph to be trained through
        assert x is not None, "an embedding or an input is there"
        cos, sin = position_tables(self.shape, positions_BS, x.dtype)
        blocks = (cast(Block, block) for block in self.blocks)
        groups = [tuple(islice(blocks, size)) for size in recompute.groups]

        def group_of(blocks: tuple[Block, ...]) -> Unit:
            return lambda x: recomputed(blocks, x, cos, sin, documents)

        def layer_of(block: Block, core: CausalAttention | None) -> Unit:
            return lambda x: block(x, cos, sin, documents, recompute.modules, core)

        attending = repeat(None) if cores is None else cores
        units = [*map(group_of, groups), *map(layer_of, blocks, attending)]
        if self.host is not None:
            return self.host.run(units, x, shared=(cos, sin))
        for unit in units:
            x = unit(x)
        return x

    def param_infos(self) -> Iterator[ParamInfo]:
        """This stage's rows of the parameter table, in forward order."""
        if self.embedding is not None:
            yield vocab_info(self.embedding.weight, "model.embed_tokens.weight", self.shape, self)
        for layer, block in zip(self.layers, self.blocks, strict=True):
            assert isinstance(block, Block), f"layer {layer} is a {type(block).__name__}"
            yield from block.param_infos(f"model.layers.{layer}", stage=self.stage)
        if self.head is not None:
            yield from self.head.norm.param_infos("model.norm", stage=self.stage, init=self.shape.norm_init)
            yield vocab_info(self.head.output.weight, "lm_head.weight", self.shape, self)


class Head(nn.Module):
    """Final norm, output projection split over the vocabulary, and the loss without gathering the logits."""

    def __init__(
        self, shape: ModelShape, *, placement: Placement, kernels: Kernels, loss_chunk_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(
            shape.hidden_size,
            eps=shape.norm_eps,
            order=shape.norm_order,
            kernels=kernels,
            placement=placement,
        )
        self.output = VocabParallelOutput(
            shape.hidden_size,
            shape.vocab_size,
            shape.padded_vocab_size,
            placement=placement,
            chunk_tokens=loss_chunk_tokens,
            unit_rows=shape.norm_head,
            max_z_loss=shape.max_z_loss,
            statistics=kernels.softmax_statistics,
            gradient=kernels.softmax_gradient,
        )

    def logits(self, x: Tensor) -> Tensor:
        """x_StBH | x_SBH -> logits_SBVt, this rank's slice of the padded vocabulary."""
        logits: Tensor = self.output(self.norm(x))
        return logits

    def forward(self, x: Tensor, batch: Batch, modules: frozenset[Module] = NO_MODULES) -> Tensor:
        """x_StBH | x_SBH -> loss_SB, or with a max-z loss (2, S, B), equal on all tp ranks.

        Where ``batch`` says what the losses will be multiplied with, no more than a chunk of the logits ever exists and
        the norm's output is not kept. Else it is not kept for backward if ``modules`` says so.
        """
        weights_SB = None
        if batch.loss_weight is not None:
            weights_SB = batch.loss_mask_BS.t().to(compute_dtype(x.dtype)) * batch.loss_weight

        def loss(x: Tensor) -> Tensor:
            out: Tensor = self.output(x, batch.labels_BS.t(), weights_SB)
            return out

        return feed(self.norm, loss, x, recompute="norms" in modules and self.output.chunk_tokens == 0)


def vocab_info(weight: nn.Parameter, name: str, shape: ModelShape, stage: AquilaStage) -> ParamInfo:
    """Row of the parameter table for a weight with one row a token; padded rows belong to no part."""
    return ParamInfo(
        param=weight,
        stage=stage.stage,
        weight_decay=True,
        init=Normal(shape.init_std),
        parts=(vocab_part(name, (shape.vocab_size, shape.hidden_size), shape.padded_vocab_size, stage.tp),),
    )


def build_stages(
    shape: ModelShape,
    plan: StagePlan,
    *,
    pp_rank: int,
    placement: Placement,
    kernels: Kernels,
    recompute: RecomputePlan = KEEP_ALL,
    loss_chunk_tokens: int | None = None,
    host: HostActivations | None = None,
) -> dict[int, AquilaStage]:
    """The stages of a pipeline rank, by stage number; weights are allocated but not yet filled. Local.

    ``host``: where activations of some of their layers wait for backward.
    """
    return {
        stage: AquilaStage(
            shape,
            plan,
            stage,
            placement=placement,
            kernels=kernels,
            recompute=recompute,
            loss_chunk_tokens=loss_chunk_tokens,
            host=host,
        )
        for stage in plan.stages_of(pp_rank)
    }
