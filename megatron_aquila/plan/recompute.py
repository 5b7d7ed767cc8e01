"""What a run computes again in backward instead of keeping it: a table of pipeline stages and microbatches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from megatron_aquila.plan.flops import attention_flops, down_matmul_params, layer_matmul_params
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import StagePlan

Kind = Literal["none", "selective", "full"]
Method = Literal["uniform", "block"]
Module = Literal["norms", "swiglu", "attention"]
MODULES: tuple[Module, ...] = get_args(Module)
NO_MODULES: frozenset[Module] = frozenset()
T = TypeVar("T")
PerStage = tuple[tuple[int, ...], ...]  # of every stage a value a microbatch, or one for all


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """What one stage computes again in the backward of one microbatch.

    ``groups`` are sizes in layers, from the stage's first layer on: of a group only the input is kept. The layers after
    them are kept but for the outputs of ``modules``.
    """

    groups: tuple[int, ...] = ()
    modules: frozenset[Module] = NO_MODULES


@dataclass(frozen=True, slots=True)
class RecomputePlan:
    """``stages``: of each stage what is recomputed, by microbatch; the last entry holds for all that follow.

    Without stages nothing is recomputed.
    """

    stages: tuple[tuple[Recompute, ...], ...] = ()

    def at(self, stage: int, microbatch: int) -> Recompute:
        """What ``stage`` recomputes in the backward of ``microbatch``, both counted from 0."""
        return _at(self.stages[stage], microbatch) if self.stages else Recompute()


KEEP_ALL = RecomputePlan()


def plan_recompute(
    stages: StagePlan,
    *,
    kind: Kind,
    method: Method = "uniform",
    num_layers: int = 1,
    modules: Sequence[Module] = ("norms", "swiglu"),
    granularities: PerStage = (),
    methods: PerStage = (),
    layers: PerStage = (),
) -> RecomputePlan:
    """The table for ``kind`` everywhere.

    ``selective`` recomputes ``modules``. ``full`` recomputes layers by ``method``: ``uniform`` all, in groups of
    ``num_layers``; ``block`` each of the first ``num_layers`` of a stage. With ``full``, stages and microbatches may
    differ, in FlagScale's numbers: of ``granularities`` 0 is none and 1 full; of ``methods`` 0 is uniform and 1 block;
    of ``layers``, which stand for ``num_layers``, 0 is none.
    """
    if kind != "full":
        chosen = frozenset(modules) if kind == "selective" else NO_MODULES
        return RecomputePlan(((Recompute(modules=chosen),),) * stages.num_stages)

    def of_stage(stage: int) -> tuple[Recompute, ...]:
        columns = [
            table[stage] if table else (default,)
            for table, default in ((granularities, 1), (methods, int(method == "block")), (layers, num_layers))
        ]
        rows = (tuple(_at(column, index) for column in columns) for index in range(max(map(len, columns))))
        return tuple(
            Recompute(groups=_groups(len(stages.layers[stage]), is_block=is_block, size=size) if is_full else ())
            for is_full, is_block, size in rows
        )

    return RecomputePlan(tuple(of_stage(stage) for stage in range(stages.num_stages)))


@dataclass(frozen=True, slots=True)
class RecomputedFlops:
    """FLOPs per token that backward spends on a second forward; ``attention`` are those of attention's products."""

    linears: float
    attention: float


def recomputed_flops(
    shape: ModelShape, stages: StagePlan, plan: RecomputePlan, num_microbatches: int
) -> RecomputedFlops:
    """What ``plan`` adds to ``flops_per_token``, on average over a step's microbatches.

    A forward is a third of a layer's FLOPs. A group runs all of its layers again but for its last projection, down.
    Norms and SwiGLU count nothing, here as there.
    """
    products = attentions = 0
    for stage, layers in enumerate(stages.layers):
        for microbatch in range(num_microbatches):
            again = plan.at(stage, microbatch)
            products += sum(again.groups) * layer_matmul_params(shape) - len(again.groups) * down_matmul_params(shape)
            attentions += sum(again.groups) + (len(layers) - sum(again.groups)) * ("attention" in again.modules)
    attention = attention_flops(shape.attention_size, shape.seq_len) / 3
    return RecomputedFlops(2 * products / num_microbatches, attentions * attention / num_microbatches)


def per_stage(words: Sequence[str]) -> PerStage:
    """FlagScale's two notations, as a value or a row of values for each stage.

    Whole numbers are pairs, a count of stages and their value: ``3 1 1 0``. Numbers joined by commas are a count of
    stages, then pairs of a count of microbatches and their value: ``"1, 30, 0, 2, 1" "3, 32, 1"``; brackets may stand
    around them. Raises ``ValueError`` with the reason for anything else.
    """
    spelled = re.sub(r"\s*,\s*", ",", re.sub(r"[][]", " ", " ".join(words)))
    try:
        rows = [[int(item) for item in row.split(",")] for row in spelled.split()]
    except ValueError:
        raise ValueError("it is not made of whole numbers") from None
    if all(len(row) == 1 for row in rows):
        flat = [row[0] for row in rows]
        if len(flat) % 2:
            raise ValueError("pairs are a count of stages and their value, so there is an even number of words")
        rows = [[count, 1, value] for count, value in zip(flat[::2], flat[1::2], strict=True)]
    table: list[tuple[int, ...]] = []
    for count, *pairs in rows:
        if not pairs or len(pairs) % 2:
            raise ValueError("after the count of stages come pairs: a count of microbatches and their value")
        if count < 1 or any(number < 1 for number in pairs[::2]) or any(value < 0 for value in pairs[1::2]):
            raise ValueError("counts are at least 1 and values at least 0")
        table += [tuple(v for n, v in zip(pairs[::2], pairs[1::2], strict=True) for _ in range(n))] * count
    return tuple(table)


def _groups(num_layers: int, *, is_block: int, size: int) -> tuple[int, ...]:
    if size == 0:
        return ()
    if is_block:
        return (1,) * min(size, num_layers)
    full, rest = divmod(num_layers, size)
    return (size,) * full + ((rest,) if rest else ())


def _at(values: tuple[T, ...], index: int) -> T:
    return values[min(index, len(values) - 1)]
