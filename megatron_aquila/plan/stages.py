"""Which layers stand on which pipeline stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_aquila.plan.flops import head_flops, layer_flops
from megatron_aquila.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The layers of every stage, along the model, and the pipeline rank each stage lives on.

    The embedding stands on the first stage, the final norm and the head on the last.
    """

    layers: tuple[range, ...]
    stage_rank: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole pipeline."""
        return len(self.layers)

    def has_embedding(self, stage: int) -> bool:
        """Whether ``stage`` begins with the embedding."""
        return stage == 0

    def has_head(self, stage: int) -> bool:
        """Whether ``stage`` ends with the final norm and the LM head."""
        return stage == self.num_stages - 1

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages that live on a pipeline rank, in the order of the model."""
        return tuple(stage for stage, rank in enumerate(self.stage_rank) if rank == pp_rank)


def plan_stages(shape: ModelShape, pp: int, layers: Sequence[int] | None = None) -> StagePlan:
    """One stage a pipeline rank: ``layers`` of each where given, else balanced by FLOPs with the head counted."""
    counts = _balanced(shape, pp) if layers is None else tuple(layers)
    assert len(counts) == pp, f"{pp} pipeline ranks, but layers for {len(counts)}: {counts}"
    assert sum(counts) == shape.num_layers, f"stages of {counts} layers are not a model of {shape.num_layers}"
    bounds = accumulate(counts, initial=0)
    return StagePlan(tuple(range(first, last) for first, last in pairwise(bounds)), tuple(range(pp)))


def stage_flops(shape: ModelShape, plan: StagePlan) -> tuple[int, ...]:
    """FLOPs per token of each stage, forward and backward."""
    return tuple(
        len(layers) * layer_flops(shape) + plan.has_head(stage) * head_flops(shape)
        for stage, layers in enumerate(plan.layers)
    )


def idle_share(shape: ModelShape, plan: StagePlan) -> float:
    """Share of the steady state that the stages wait for the most loaded one: ``1 - mean / max`` of their FLOPs."""
    flops = stage_flops(shape, plan)
    return 1 - sum(flops) / len(flops) / max(flops)


def _balanced(shape: ModelShape, pp: int) -> tuple[int, ...]:
    """Layers a stage with the lightest most loaded stage; among equals, the most layers on the last."""
    assert 1 <= pp <= shape.num_layers, f"{shape.num_layers} layers cannot fill {pp} stages"
    if pp == 1:
        return (shape.num_layers,)

    def heaviest(last: int) -> int:
        others = math.ceil((shape.num_layers - last) / (pp - 1))
        return max(others * layer_flops(shape), last * layer_flops(shape) + head_flops(shape))

    last = min(range(1, shape.num_layers - pp + 2), key=lambda count: (heaviest(count), -count))
    each, extra = divmod(shape.num_layers - last, pp - 1)
    # The first stages keep the most microbatches in flight and the embedding: the spare layers go to later ones.
    return (*(each + (stage >= pp - 1 - extra) for stage in range(pp - 1)), last)
