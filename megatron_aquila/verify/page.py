"""Tables for people: the matrix as Markdown, put where a page keeps its place; and what a program reads."""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_aquila import __version__
from megatron_aquila.errors import AquilaError
from megatron_aquila.verify.compare import BOUND, Row
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.matrix import MatrixCase, MatrixRow

HEADER = (
    "tp",
    "sp",
    "cp",
    "pp",
    "schedule",
    "chunks",
    "dp",
    "ZeRO",
    "mbs",
    "recompute",
    "overlap",
    "buckets",
    "fused",
    "offload",
    "documents",
)


def case_cells(case: MatrixCase) -> list[str]:
    """A case under ``HEADER``."""
    layout = case.layout
    has_schedule = (layout.pp, layout.schedule, layout.chunks) != (1, "1f1b", 1)
    buckets = "small" if layout.small_buckets else "whole"
    return [
        str(layout.tp),
        "yes" if layout.sequence else "–",
        "1" if layout.cp == 1 else f"{layout.cp} {layout.cp_method}",
        str(layout.pp),
        layout.schedule if has_schedule else "–",
        str(layout.chunks) if has_schedule else "–",
        str(layout.dp),
        _zero(layout),
        f"{layout.micro_batch}{', uneven' * layout.uneven}",
        layout.recompute,
        "yes" if layout.overlap else "–",
        (buckets + ", deterministic" * layout.deterministic) if layout.dp > 1 else "–",
        "yes" if layout.fused else "–",
        ", ".join(["states"] * layout.offload + ["activations"] * layout.offload_activations) or "–",
        "apart" if case.documents else "–",
    ]


def _zero(layout: Layout) -> str:
    """The level, and of which groups of ranks."""
    groups = "" if layout.zero_group is None else f" by {layout.zero_group}"
    return f"{layout.zero}{groups}" if layout.dp > 1 else "–"


def matrix_table(rows: Sequence[MatrixRow]) -> str:
    """The matrix as Markdown, and a line that sums it up. Bits have a column where any row compared them."""
    with_bits = any(row.bits is not None for row in rows)
    header = (*HEADER, "worst error", *(["bits"] if with_bits else []), "verdict")
    cells = [
        [
            *case_cells(row.case),
            f"{row.plain.worst.error:.1e}",
            *([_bits(row)] if with_bits else []),
            "holds" if row.holds else f"FAILS at {next(one.first_wrong for one in row.rows if not one.holds)}",
        ]
        for row in rows
    ]
    failed = sum(not row.holds for row in rows)
    summary = f"{len(rows)} cases, {failed} failures, torch {torch.__version__}, bound {BOUND:g}."
    return f"{markdown(header, cells)}\n\n{summary}"


def _bits(row: MatrixRow) -> str:
    """Whether they equal those of one process, where that is due."""
    return "–" if row.bits is None else "equal" if row.bits.holds else "DIFFER"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def put(page: str, name: str, body: str) -> str:
    """``page`` with ``body`` between its lines ``<!-- NAME: ... -->`` and ``<!-- /NAME -->``.

    Raises AquilaError where it has no such place.
    """
    place = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*(<!-- /{name} -->)", re.DOTALL)
    found, count = place.subn(lambda match: f"{match[1]}\n{body}\n\n{match[2]}", page)
    if count != 1:
        raise AquilaError(f"the page has no place for it: a line <!-- {name}: ... --> and a line <!-- /{name} -->")
    return found


def write(path: Path, text: str) -> None:
    """Write the file under another name and then give it its own, so that it is whole or not there."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was found, and with what: values that JSON can carry."""
    return {
        "holds": all(row.holds for row in rows),
        "bound": BOUND,
        "versions": {"megatron_aquila": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": [_row(row) for row in rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "axis": row.axis,
        "layout": asdict(row.layout),
        "processes": row.layout.world_size,
        "against": row.against,
        "worst_tensor": row.worst.tensor,
        "error": row.worst.error if row.worst.error == row.worst.error else None,  # JSON has no NaN
        "holds": row.holds,
        "first_wrong": row.first_wrong,
        "smallest_failing": None if row.smallest is None else asdict(row.smallest),
    }
