"""Memory of one rank before anything is allocated: a sum of named parts, each with its formula.

Not in it: the device's own context, NCCL's buffers and fragmentation (2 to 4 GiB of a GPU in practice).
"""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_aquila.plan.flops import layer_matmul_params
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.recompute import KEEP_ALL, NO_MODULES, Module, Recompute, RecomputePlan
from megatron_aquila.plan.shape import ModelShape, Precision
from megatron_aquila.plan.stages import StagePlan

ITEM_BYTES: dict[Precision, int] = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
GRADIENT_BYTES: dict[Precision, int] = {"bf16": 4, "fp16": 4, "fp32": 4, "fp64": 8}
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
    """What the estimate needs beside the shape; every count of tokens is ``micro_batch * shape.seq_len``."""

    shape: ModelShape
    grid: RankGrid
    stages: StagePlan
    micro_batch: int
    num_microbatches: int
    schedule: Literal["1f1b", "gpipe", "zb-h1"] = "1f1b"
    sequence_parallel: bool = False
    precision: Precision = "bf16"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    recompute: RecomputePlan = KEEP_ALL

    def of_stage(self, stage: int) -> Memory:
        """Bytes of a rank that holds ``stage``."""
        params = self.stage_params(stage)
        shard = -(-params // (self.grid.dp * self.grid.cp))
        gradient = GRADIENT_BYTES[self.precision]
        in_flight = self.in_flight(stage)
        return Memory(
            weights=params * self._item,
            main_grads=params * gradient,  # ZeRO-1 shards what follows, not these
            master_weights=shard * 4 if ITEM_BYTES[self.precision] < 4 else 0,
            optimizer_states=shard * gradient * MOMENTS[self.optimizer],
            activations=self._kept(stage, in_flight),
            logits=self._logits(in_flight) if self.stages.has_head(stage) else 0,
            temporaries=self._temporaries() + self._recomputed(stage),
        )

    def peak(self) -> Memory:
        """The memory of the rank that needs the most."""
        return max((self.of_stage(stage) for stage in range(self.stages.num_stages)), key=lambda memory: memory.total)

    def in_flight(self, stage: int) -> int:
        """Microbatches whose activations a stage keeps at once.

        GPipe all ``m``; 1F1B ``min(stages behind it, m)``; ZB-H1 on every stage as many as 1F1B on the first.
        """
        if self.schedule == "gpipe":
            return self.num_microbatches
        ahead = 0 if self.schedule == "zb-h1" else stage
        return min(self.stages.num_stages - ahead, self.num_microbatches)

    def stage_params(self, stage: int) -> int:
        """Elements of this rank's shard of the stage, padded rows included; norms are whole on every rank."""
        num_layers = len(self.stages.layers[stage])
        ends = self.stages.has_embedding(stage) + self.stages.has_head(stage)
        vocab = ends * self.shape.padded_vocab_size * self.shape.hidden_size
        norms = (2 * num_layers + self.stages.has_head(stage)) * self.shape.hidden_size
        return (num_layers * layer_matmul_params(self.shape) + vocab) // self.grid.tp + norms

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
        return self.micro_batch * self.shape.seq_len // self.grid.cp

    def _kept(self, stage: int, in_flight: int) -> int:
        """Bytes that autograd keeps of ``in_flight`` consecutive microbatches, whichever keep the most.

        A backward without weight gradients leaves what those need, as much as without recomputation.
        """
        owed = min(stage, in_flight) if self.schedule == "zb-h1" else 0
        window = in_flight - owed
        by_microbatch = [
            self._activations(stage, self.recompute.at(stage, microbatch))
            for microbatch in range(self.num_microbatches)
        ]
        sums = (sum(by_microbatch[first : first + window]) for first in range(self.num_microbatches - window + 1))
        return owed * self._activations(stage, Recompute()) + max(sums)

    def _activations(self, stage: int, recompute: Recompute) -> int:
        """Bytes that autograd keeps of one microbatch, every op saving its inputs once; a test measures the model.

        This is 8.0 GiB of the 7B at 2,048 tokens, without recomputation. Of a recomputed group its input is kept.
        """
        residual = self._item * self.shape.hidden_size // self._residual_shards
        layers = len(self.stages.layers[stage]) - sum(recompute.groups)
        final_norm = self._tokens * 2 * residual if self.stages.has_head(stage) else 0
        if "norms" in recompute.modules:
            final_norm //= 2
        groups = self._tokens * len(recompute.groups) * residual
        return layers * self._layer(recompute.modules) + groups + final_norm

    def _layer(self, modules: frozenset[Module] = NO_MODULES) -> int:
        """Bytes that autograd keeps of one layer and microbatch, less the outputs of ``modules``.

        Elements a token, 1/tp of each: the two norms' inputs and outputs 4 H (whole where the sequence is not split),
        q, k, v and the attention's output, gate and up 2 F, their product F; in at least four bytes the attention's
        log-sum 1 a head and each norm's scale 1.
        """
        shape, tp = self.shape, self.grid.tp
        norms, attention, product = ("norms" not in modules, "attention" not in modules, "swiglu" not in modules)
        residual = (2 + 2 * norms) * shape.hidden_size // self._residual_shards
        shard = (1 + attention) * shape.attention_size + 2 * shape.kv_size + (2 + product) * shape.ffn_size
        wide = attention * shape.num_heads // tp + 2 * norms
        return self._tokens * (self._item * (residual + shard // tp) + self._wide * wide)

    def _recomputed(self, stage: int) -> int:
        """Bytes of the largest group of layers, all there between its recomputation and the end of its backward."""
        recomputes = {self.recompute.at(stage, microbatch) for microbatch in range(self.num_microbatches)}
        return max((size for recompute in recomputes for size in recompute.groups), default=0) * self._layer()

    @property
    def _residual_shards(self) -> int:
        """Into how many parts the residual stream is split."""
        return self.grid.tp if self.sequence_parallel else 1

    def _logits(self, in_flight: int) -> int:
        """Bytes of the logits of each microbatch in flight, and of one wide softmax and its narrow gradient."""
        columns = self.shape.padded_vocab_size // self.grid.tp
        return self._tokens * columns * (in_flight * self._item + self._wide + self._item)

    def _temporaries(self) -> int:
        """Bytes of the widest moment of a layer's backward: gradients of gate, up and their product, x gathered twice.

        Beside them the largest weight's gradient, which lives until it is added to the main gradient.
        """
        shape = self.shape
        widest = self._tokens * (3 * shape.ffn_size // self.grid.tp + 2 * shape.hidden_size)
        largest = max(2 * shape.ffn_size, shape.padded_vocab_size) * shape.hidden_size // self.grid.tp
        return self._item * (widest + largest)
