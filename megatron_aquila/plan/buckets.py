"""The parameters of a rank and the buckets its gradients travel in, as numbers of elements.

The same arithmetic as ``optim.groups`` does on real parameters; a test holds the two together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import StagePlan

ALIGNMENT = 64  # elements; where a weight and a shard may begin


@dataclass(frozen=True, slots=True)
class ParameterSize:
    """One local parameter: its elements, padded rows included, and whether it decays."""

    elements: int
    decays: bool


def stage_parameters(shape: ModelShape, stages: StagePlan, stage: int, tp: int) -> Iterator[ParameterSize]:
    """The parameters of a tensor rank's shard of ``stage``, in forward order; norms are whole on every rank."""
    norm = ParameterSize(shape.hidden_size, decays=False)

    def matrix(rows: int) -> ParameterSize:
        """One of ``rows`` times hidden size elements, split over ``tp``."""
        return ParameterSize(rows * shape.hidden_size // tp, decays=True)

    if stages.has_embedding(stage):
        yield matrix(shape.padded_vocab_size)
    for _ in stages.layers[stage]:
        yield from (norm, norm)
        yield from (matrix(shape.attention_size + 2 * shape.kv_size), matrix(shape.attention_size))
        yield from (matrix(2 * shape.ffn_size), matrix(shape.ffn_size))
    if stages.has_head(stage):
        yield from (norm, matrix(shape.padded_vocab_size))


@dataclass(frozen=True, slots=True)
class StageBucket:
    """A bucket of ``stage``: the places of its parameters among the stage's, and its elements, padding included."""

    stage: int
    places: tuple[int, ...]
    elements: int
    decays: bool


def rank_buckets(
    shape: ModelShape, stages: StagePlan, pp_rank: int, *, tp: int, limit: int, num_shards: int
) -> list[StageBucket]:
    """``stage_buckets`` of all stages of a pipeline rank, in the order of the model."""
    return [
        bucket
        for stage in stages.stages_of(pp_rank)
        for bucket in stage_buckets(
            list(stage_parameters(shape, stages, stage, tp)), stage=stage, limit=limit, num_shards=num_shards
        )
    ]


def stage_buckets(parameters: Sequence[ParameterSize], *, stage: int, limit: int, num_shards: int) -> list[StageBucket]:
    """The buckets of one stage, each with at most ``limit`` elements of parameters (or one larger).

    They are filled from the end of the stage. Parameters that decay and those that do not have buckets of their own; a
    bucket splits into ``num_shards`` shards.
    """
    open_buckets: dict[bool, StageBucket] = {}
    full: list[StageBucket] = []
    for place, parameter in reversed([*enumerate(parameters)]):
        bucket = open_buckets.get(parameter.decays, StageBucket(stage, (), 0, parameter.decays))
        if bucket.places and bucket.elements + parameter.elements > limit:
            full.append(bucket)
            bucket = StageBucket(stage, (), 0, parameter.decays)
        elements = _aligned(bucket.elements + parameter.elements)
        open_buckets[parameter.decays] = replace(bucket, places=(place, *bucket.places), elements=elements)
    whole = [
        replace(bucket, elements=num_shards * _aligned(-(-bucket.elements // num_shards)))
        for bucket in (*full, *open_buckets.values())
    ]
    return sorted(whole, key=lambda bucket: bucket.places)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
