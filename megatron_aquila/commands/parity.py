"""``aquila parity``: prove that a layout computes the same model as one process."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import load_config, with_config_flag
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.verify.compare import BOUND, Row
from megatron_aquila.verify.layout import requested_layout
from megatron_aquila.verify.matrix import MatrixRow, matrix_cases, run_matrix
from megatron_aquila.verify.page import as_json, matrix_table, put, write
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.pool import WorkerPool

Pools = Callable[[int], WorkerPool]


def _option(name: str, help: str) -> Any:
    return tyro.conf.arg(name=name, help=help, help_behavior_hint="")


class ParityOptions(TypedDict, total=False):
    """Of this command only."""

    matrix: Annotated[
        bool, _option("matrix", "prove a sample of all combinations, in which every two settings meet, instead")
    ]
    json: Annotated[Path, _option("json", "write what was found to this file")]
    markdown: Annotated[
        tuple[Path, ...], _option("markdown", "put the table of --matrix into its place in these pages")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Shrink the given config, run it in float64 under each axis of its layout, print a row each.

    Returns 0 only if every row holds.
    """
    arguments = with_config_flag(sys.argv[1:] if argv is None else argv)
    with exit_code() as code:
        loaded = load_config(arguments, prog="aquila parity [CONFIG.yaml]", options=ParityOptions)
        problems = list(wrong(loaded.options))
        if problems:
            raise ConfigError(problems)
        rows = prove_matrix(loaded.config, loaded.options) if "matrix" in loaded.options else prove(loaded.config)
        if "json" in loaded.options:
            write(loaded.options["json"], json.dumps(as_json(rows), indent=1) + "\n")
        code.value = 0 if all(row.holds for row in rows) else 1
    return code.value


def wrong(options: Mapping[str, Any]) -> Iterator[Problem]:
    """What cannot be with the command's own flags, before anything is run."""
    if "json" in options and not options["json"].absolute().parent.is_dir():
        yield Problem("--json", options["json"], "its folder does not exist", "make the folder first")
    if "markdown" not in options:
        return
    if "matrix" not in options:
        pages = spell(options["markdown"])
        yield Problem("--markdown", pages, "only --matrix makes a table for a page", "give --matrix")
    for page in options["markdown"]:
        if not page.is_file():
            why = "there is no such page"
            way_out = "make it first, with the lines <!-- matrix: --> and <!-- /matrix -->"
            yield Problem("--markdown", page, why, way_out)


@contextmanager
def worker_pools() -> Iterator[Pools]:
    """``pool(world)``: workers, started when first asked for and ended with the block."""
    pools: dict[int, WorkerPool] = {}

    def pool(world: int) -> WorkerPool:
        if world not in pools:
            pools[world] = WorkerPool(world)
        return pools[world]

    try:
        yield pool
    finally:
        for one in pools.values():
            one.close()


def prove(config: RunConfig) -> list[Row]:
    """Run and print the table of the config's own axes."""
    requested, console = requested_layout(config), _console()
    if requested.world_size == 1 and requested.micro_batch == 1:
        print("warning: no axis is above 1, so the engine is only compared in one process; give e.g. --tp 2 --pp 2")
    with worker_pools() as pool:
        parity = Parity(config, requested, pool)
        console.print(
            f"{requested}, float64, a model of {parity.shape.num_layers} layers, bound {BOUND:g} of each norm"
        )
        with console.status("running layouts"):
            rows = list(parity.rows())
    console.print(table(rows))
    explain(rows, console)
    return rows


def prove_matrix(config: RunConfig, options: Mapping[str, Any]) -> list[Row]:
    """Run and print the matrix, a line a case, and put it into the pages."""
    console, found = _console(), list[MatrixRow]()
    console.print(f"{len(matrix_cases())} cases in which every two settings meet, float64, bound {BOUND:g}")
    with worker_pools() as pool:
        for one in run_matrix(config, pool):
            found.append(one)
            documents = " documents apart" if one.case.documents else ""
            bits = "" if one.bits is None else ", bits equal" if one.bits.holds else ", bits DIFFER"
            verdict = f"{_verdict(one.holds)}  {one.plain.worst.error:.1e}{bits}"
            console.print(f"{verdict}  {escape(str(one.case.layout))}{documents}  [dim]{one.seconds:.1f} s[/dim]")
    rows = [row for one in found for row in one.rows]
    explain(rows, console)
    for page in options.get("markdown", ()):
        write(page, put(page.read_text(encoding="utf-8"), "matrix", matrix_table(found)))
    return rows


def _console() -> Console:
    # A pipe has no width of its own: tensors are named in full there.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _verdict(holds: bool) -> str:
    return "[green]holds[/green]" if holds else "[red]FAILS[/red]"


def table(rows: Sequence[Row]) -> Table:
    """A row an axis: the layout, what it was held against, the worst tensor and its error."""
    out = Table("axis", "layout", "against", "worst tensor", "error", "")
    for row in rows:
        worst = row.worst.tensor if row.worst.error != 0 else "–"
        out.add_row(row.axis, str(row.layout), row.against, worst, f"{row.worst.error:.1e}", _verdict(row.holds))
    return out


def explain(rows: Sequence[Row], console: Console) -> None:
    """Of each row that fails, where it goes wrong first and what it takes."""
    for row in rows:
        if not row.holds:
            console.print(f"{row.axis}: the first wrong tensor is {row.first_wrong}")
            console.print(f"{row.axis}: the fewest options that fail: {row.smallest}")
