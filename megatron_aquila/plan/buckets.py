"""The parameters of a rank and the buckets its gradients travel in, as numbers of elements.

The same arithmetic as ``optim.groups`` does on real parameters; a test holds the two together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


def rank_buckets(
    shape: ModelShape, stages: StagePlan, pp_rank: int, *, tp: int, limit: int, num_shards: int
) -> list[int]:
    """``bucket_sizes`` of all stages of a pipeline rank."""
    return [
        size
        for stage in stages.stages_of(pp_rank)
        for size in bucket_sizes(list(stage_parameters(shape, stages, stage, tp)), limit=limit, num_shards=num_shards)
    ]


def bucket_sizes(parameters: Sequence[ParameterSize], *, limit: int, num_shards: int) -> list[int]:
    """Elements of each bucket of one stage, padding included, with at most ``limit`` of parameters (or one larger).

    They are filled from the end of the stage. Parameters that decay and those that do not have buckets of their own; a
    bucket splits into ``num_shards`` shards.
    """
    open_buckets: dict[bool, int] = {}
    full: list[int] = []
    for parameter in reversed(parameters):
        size = open_buckets.get(parameter.decays, 0)
        if size > 0 and size + parameter.elements > limit:
            full.append(size)
            size = 0
        open_buckets[parameter.decays] = _aligned(size + parameter.elements)
    return [num_shards * _aligned(-(-size // num_shards)) for size in (*full, *open_buckets.values())]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
