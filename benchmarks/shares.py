"""Figures beside what they are held against: the fastest of transformers' steps, and what ``ceilings`` found."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.common import Row
from benchmarks.tables import STEP_SHAPE

Rate = Callable[[Row], float | None]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of steps, ours with their speed as a multiple of the fastest of transformers' at the same shape."""

    def shape(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in STEP_SHAPE)

    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if str(row.get("name", "")).startswith("transformers") and row.get("tokens_per_second"):
            best[shape(row)] = max(best.get(shape(row), 0.0), row["tokens_per_second"])
    return [
        row | {"ratio": row["tokens_per_second"] / best[shape(row)]}
        if str(row.get("name", "")).startswith("megatron_aquila")
        and row.get("tokens_per_second")
        and shape(row) in best
        else row
        for row in rows
    ]


def with_ceilings(result: Row, found: Iterable[Row]) -> Row:
    """A result of kernels or steps, its rates also as shares of what the same GPU gives at best; else as it is."""
    gpu = result["machine"].get("gpu")
    ceilings = [one for one in found if one["benchmark"] == "ceilings" and one["machine"].get("gpu") == gpu]
    if gpu is None or not ceilings or result["benchmark"] not in ("kernels", "step"):
        return result
    tables = ceilings[-1]["tables"]
    kernels, seq_len = _kernel_ceiling(tables), result["settings"].get("seq_len")
    told: dict[str, tuple[str, Rate]] = {
        "kernels": ("rate", lambda row: kernels(row | {"seq_len": seq_len})),
        "step": ("tflops", lambda row: _best(tables, "gemm", model=row["model"].removesuffix("-8"))),
    }
    name = result["benchmark"]
    rate, ceiling_of = told[name]
    rows = [
        row | {"ceiling_share": row[rate] / ceiling} if rate in row and (ceiling := ceiling_of(row)) else row
        for row in result["tables"].get(name, [])
    ]
    return result | {"tables": result["tables"] | {name: rows}}


def _kernel_ceiling(tables: Row) -> Rate:
    """Bytes against a copy's, attention against torch's best at its shape, other products against the best of them."""

    def ceiling(row: Row) -> float | None:
        if row["unit"] == "TB/s":
            return max((copy["tbytes_per_second"] for copy in tables.get("copy", [])), default=None)
        if row["op"] == "attention":
            shape = {key: row[key] for key in ("model", "seq_len", "direction")}
            return _best(tables, "attention", **shape)
        if row["op"].startswith("attention"):
            return None  # shorter documents are another shape
        return _best(tables, "gemm", model=row["model"])

    return ceiling


def _best(tables: Row, name: str, **where: object) -> float | None:
    """The highest rate of a table's rows that have these values; None where there is none."""
    rows = (row for row in tables.get(name, []) if "tflops" in row and row.items() >= where.items())
    return max((row["tflops"] for row in rows), default=None)
