"""``aquila config``: what a command line comes to, and where each value came from."""

import sys
from collections.abc import Sequence
from typing import Annotated, TypedDict

import tyro
from rich.console import Console
from rich.table import Table

from megatron_aquila.config.cli import parse, resolve
from megatron_aquila.config.derive import derive
from megatron_aquila.config.describe import TRAFFIC_COLUMNS, derived_rows, setting_rows, traffic_rows
from megatron_aquila.config.migration_page import migration_page
from megatron_aquila.errors import ConfigError, format_problems
from megatron_aquila.train.bubble import run_bubble, run_schedule

USAGE = """usage: aquila config show [--world-size N] [FLAGS]     print every setting, its source, and what follows
       aquila config from-megatron                     print the table of Megatron-LM's flags"""

_RANKS = "ranks to plan for; default the fewest that the layout fits"


class ShowOptions(TypedDict, total=False):
    """Of this command only."""

    world_size: Annotated[int, tyro.conf.arg(name="world-size", help=_RANKS, help_behavior_hint="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``aquila config``; the exit status."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["show", *rest]:
            return _show(rest)
        case ["from-megatron"]:
            print(migration_page(), end="")
            return 0
        case ["--help" | "-h"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


def _show(argv: Sequence[str]) -> int:
    try:
        parsed = parse(argv, prog="aquila config show", options=ShowOptions)
        world_size = parsed.options.get("world_size")
        loaded = resolve(parsed, world_size=world_size)
    except ConfigError as error:
        print(format_problems(error), file=sys.stderr)
        return 2
    derived = derive(loaded.config, world_size)
    title = "what follows" if world_size is not None else "what follows, on the fewest ranks"
    _print_rows("settings", ("setting", "value", "from"), setting_rows(loaded))
    order = run_schedule(loaded.config, derived)
    _print_rows(title, ("", ""), derived_rows(loaded.config, derived, order, bubble=run_bubble(derived, order)))
    busiest, traffic = traffic_rows(loaded.config, derived, order)
    if traffic:
        title = f"communication of a step, pipeline rank {busiest}: calls, their bytes, and what leaves the rank"
        _print_rows(title, TRAFFIC_COLUMNS, traffic)
    if loaded.missing:
        _print_rows("to train, give also", ("", ""), [(problem.flag, problem.way_out) for problem in loaded.missing])
    return 0


def _print_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table where a terminal is there, else plain lines in columns."""
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        table = Table(*header, title=title, title_justify="left", show_header=any(header))
        for row in rows:
            table.add_row(*row, style="dim" if row[-1] == "default" else None)
        console.print(table)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    print(f"{title}:")
    for *cells, last in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join(["", *padded, last]))
