"""Which layers stand on which pipeline stage, and which stages on which rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from megatron_aquila.plan.flops import head_flops, layer_flops
from megatron_aquila.plan.shape import ModelShape

ScheduleName = Literal["1f1b", "gpipe", "zb-h1", "zb-v"]
FIXED_CHUNKS: Mapping[str, int] = {"zb-h1": 1, "zb-v": 2}  # schedules that exist for one number of stages a rank only


def stage_ranks(schedule: str, pp: int, chunks: int) -> tuple[int, ...]:
    """The pipeline rank of every stage, ``chunks`` of them a rank.

    A loop, rank r holding stages r, r + pp, r + 2 pp, ...; ZB-V alone goes up the ranks and back down.
    """
    assert chunks == FIXED_CHUNKS.get(schedule, chunks), f"{schedule} does not have {chunks} stages a rank"
    up = tuple(range(pp))
    return up + up[::-1] if schedule == "zb-v" else up * chunks


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

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks."""
        return max(self.stage_rank) + 1

    @property
    def chunks(self) -> int:
        """Stages a rank."""
        return self.num_stages // self.num_ranks

    @property
    def turns_back(self) -> bool:
        """Whether a stage sends its activations to a lower rank: a loop's last rank, a V's second leg."""
        return any(after < before for before, after in pairwise(self.stage_rank))

    def has_embedding(self, stage: int) -> bool:
        """Whether ``stage`` begins with the embedding."""
        return stage == 0

    def has_head(self, stage: int) -> bool:
        """Whether ``stage`` ends with the final norm and the LM head."""
        return stage == self.num_stages - 1

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages that live on a pipeline rank, in the order of the model."""
        return tuple(stage for stage, rank in enumerate(self.stage_rank) if rank == pp_rank)


def plan_stages(
    shape: ModelShape,
    pp: int,
    layers: Sequence[int] | None = None,
    *,
    chunks: int = 1,
    schedule: ScheduleName = "1f1b",
) -> StagePlan:
    """``chunks`` stages a pipeline rank, placed as ``schedule`` has them.

    ``layers`` of each stage where given: all but the first and the last have one, which may hold the embedding or the
    head alone. By default they are balanced, see ``_balanced``.
    """
    stage_rank = stage_ranks(schedule, pp, chunks)
    counts = _balanced(shape, stage_rank) if layers is None else tuple(layers)
    assert len(counts) == len(stage_rank), f"{len(stage_rank)} stages, but layers for {len(counts)}: {counts}"
    assert sum(counts) == shape.num_layers, f"stages of {counts} layers are not a model of {shape.num_layers}"
    assert all(counts[1:-1]), f"a stage between the first and the last of {counts} layers holds nothing"
    bounds = accumulate(counts, initial=0)
    return StagePlan(tuple(range(first, last) for first, last in pairwise(bounds)), stage_rank)


def stage_flops(shape: ModelShape, plan: StagePlan) -> tuple[int, ...]:
    """FLOPs per token of each stage, forward and backward; the embedding, a look-up, has none."""
    return tuple(
        len(layers) * layer_flops(shape) + plan.has_head(stage) * head_flops(shape)
        for stage, layers in enumerate(plan.layers)
    )


def rank_flops(shape: ModelShape, plan: StagePlan) -> tuple[int, ...]:
    """FLOPs per token of each pipeline rank: of all its stages together."""
    flops = stage_flops(shape, plan)
    return tuple(sum(flops[stage] for stage in plan.stages_of(rank)) for rank in range(plan.num_ranks))


def of_mean(values: Sequence[int]) -> tuple[float, ...]:
    """Each value as a multiple of their mean."""
    return tuple(value * len(values) / sum(values) for value in values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bubble:
    """Share of a step, up to its barrier, that ranks wait: with the run's own stages, and if all were ``equal``."""

    own: float
    equal: float


def idle_share(shape: ModelShape, plan: StagePlan) -> float:
    """Share of the steady state that the ranks wait for the most loaded one: ``1 - mean / max`` of their FLOPs."""
    flops = rank_flops(shape, plan)
    return 1 - sum(flops) / len(flops) / max(flops)


def _balanced(shape: ModelShape, stage_rank: Sequence[int]) -> tuple[int, ...]:
    """Layers a stage: the heaviest rank as light as can be, then each rank's layers spread over its stages likewise.

    The heaviest rank sets the pace of the steady state, whatever its stages are; an uneven stage within a rank only
    lengthens the start and the end of a step.
    """
    assert len(stage_rank) <= shape.num_layers, f"{shape.num_layers} layers cannot fill {len(stage_rank)} stages"
    num_ranks = max(stage_rank) + 1
    chunks = len(stage_rank) // num_ranks
    layer, head = layer_flops(shape), head_flops(shape)
    ranks = [rank for rank in range(num_ranks) if rank != stage_rank[-1]] + [stage_rank[-1]]  # that with the head last
    totals = dict(zip(ranks, _spread(shape.num_layers, num_ranks, least=chunks, layer=layer, head=head), strict=True))
    parts = {
        rank: iter(_spread(total, chunks, least=1, layer=layer, head=head if rank == stage_rank[-1] else 0))
        for rank, total in totals.items()
    }
    return tuple(next(parts[rank]) for rank in stage_rank)


def _spread(layers: int, places: int, *, least: int, layer: int, head: int) -> tuple[int, ...]:
    """``layers`` over ``places``, the last of which also has the head: the heaviest place is as light as can be.

    Every place has at least ``least``; among equals the last has the most.
    """
    if places == 1:
        return (layers,)

    def heaviest(last: int) -> int:
        others = math.ceil((layers - last) / (places - 1))
        return max(others * layer, last * layer + head)

    last = min(range(least, layers - least * (places - 1) + 1), key=lambda count: (heaviest(count), -count))
    each, extra = divmod(layers - last, places - 1)
    # The first keep the most microbatches in flight, and the embedding: the spare layers go to later ones.
    return (*(each + (place >= places - 1 - extra) for place in range(places - 1)), last)
