"""The grid of everything that can be combined, proved by a sample in which every two settings meet."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from megatron_aquila.config.check_family import check_family
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.recompute import Kind
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.stages import ScheduleName
from megatron_aquila.verify.compare import Row
from megatron_aquila.verify.cover import cover, grid, pairwise_cover
from megatron_aquila.verify.layout import Layout, is_supported, with_layout
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.rows import Claim

MOST_PROCESSES = 8
YES_OR_NO = (False, True)
# What stands first is preferred where the cover leaves a choice.
SPLITS: Mapping[str, Sequence[Any]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "dp": (1, 2),
    "cp": (1, 2, 4),
    "cp_method": get_args(ContextMethod),
    "zero": (1, 2, 3),
    "zero_group": (None, 1, 2),
    "sequence": YES_OR_NO,
    "schedule": get_args(ScheduleName),
    "chunks": (1, 2),
}
SWITCHES: Mapping[str, Sequence[Any]] = {
    "micro_batch": (1, 2),
    "uneven": YES_OR_NO,
    "recompute": get_args(Kind),
    "overlap": YES_OR_NO,
    "small_buckets": YES_OR_NO,
    "deterministic": YES_OR_NO,
    "fused": YES_OR_NO,
    "offload": YES_OR_NO,
    "offload_activations": YES_OR_NO,
    "documents": YES_OR_NO,
}
AXES = {**SPLITS, **SWITCHES}
LARGEST = Layout(**{name: max(AXES[name]) for name in ("tp", "pp", "dp", "cp", "micro_batch", "chunks")})


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixCase:
    """One combination: how to run, and whether documents are kept apart."""

    layout: Layout
    documents: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRow:
    """What was found: against the plain reference, and, where bits are due, against the world of one."""

    case: MatrixCase
    plain: Row
    bits: Row | None
    seconds: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """All that was compared."""
        return (self.plain,) if self.bits is None else (self.plain, self.bits)

    @property
    def holds(self) -> bool:
        """Whether every tensor is as near as it must be."""
        return all(row.holds for row in self.rows)


def case_of(values: Mapping[str, Any]) -> MatrixCase:
    """The combination that these values of ``AXES`` name."""
    ways = {name: value for name, value in values.items() if name != "documents"}
    return MatrixCase(layout=Layout(**ways), documents=values["documents"])


def is_case(values: Mapping[str, Any]) -> bool:
    """Whether the combination can be run here."""
    layout = case_of(values).layout
    return layout.world_size <= MOST_PROCESSES and is_supported(layout)


@cache
def matrix_cases() -> tuple[MatrixCase, ...]:
    """The sample, cheap cases first: of every split with each of a few settings of the switches in which all meet."""
    switches = pairwise_cover(SWITCHES, lambda values: is_case({**values, "dp": 2}))
    splits = (values for values in grid(SPLITS) if Layout(**values).world_size <= MOST_PROCESSES)
    cases = [values for split, others in itertools.product(splits, switches) if is_case(values := {**split, **others})]
    found = [case_of(values) for values in cover(AXES, cases)]
    return tuple(sorted(found, key=lambda case: case.layout.world_size))


def twin_of(layout: Layout) -> Layout | None:
    """The one process whose gradients those of ``layout`` must equal bit for bit; none where sums are split."""
    if layout.tp * layout.cp * layout.dp > 1:
        return None
    twin = Layout(micro_batch=layout.micro_batch, fused=layout.fused)
    return None if twin == layout else twin


def is_offered(config: RunConfig, case: MatrixCase) -> bool:
    """Whether a model of the config's family can be trained so."""
    asked = with_layout(matrix_config(config, documents=case.documents), case.layout)
    return next(iter(check_family(asked, None)), None) is None


def run_matrix(config: RunConfig, pool: Callable[[int], WorkerPool]) -> Iterator[MatrixRow]:
    """Every case of the sample that the family of ``config`` offers, on one small model made of it, a row as soon as it
    is known.
    """
    proofs = {documents: Parity(matrix_config(config, documents=documents), LARGEST, pool) for documents in YES_OR_NO}
    for case in matrix_cases():
        if is_offered(config, case):
            yield run_case(case, proofs[case.documents])


def run_case(case: MatrixCase, parity: Parity) -> MatrixRow:
    """One case."""
    started, layout = time.perf_counter(), case.layout
    plain = parity.judge(Claim(axis="matrix", layout=layout))
    twin = twin_of(layout)
    bits = None if twin is None else parity.judge(Claim(axis="matrix", layout=layout, twin=twin, bits="gradients"))
    return MatrixRow(case=case, plain=plain, bits=bits, seconds=time.perf_counter() - started)


def matrix_config(config: RunConfig, *, documents: bool) -> RunConfig:
    """``config`` with balanced stages, and documents kept apart in everything or in nothing."""
    return replace(
        config,
        parallel=replace(config.parallel, stage_layers=None, pipeline_layout=None),
        data=replace(
            config.data, reset_position_ids=documents, reset_attention_mask=documents, eod_mask_loss=documents
        ),
    )
