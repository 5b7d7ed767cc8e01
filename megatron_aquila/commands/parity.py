"""``aquila parity``: prove that a layout computes the same model as one process."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import load_config, with_config_flag
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.verify.parity import BOUND, Parity, Row
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import Layout


def main(argv: Sequence[str] | None = None) -> int:
    """Shrink the given config, run it in float64 under each axis of its layout, print a row each.

    Returns 0 only if every row holds.
    """
    arguments = with_config_flag(sys.argv[1:] if argv is None else argv)
    with exit_code() as code:
        code.value = 0 if prove(load_config(arguments, prog="aquila parity [CONFIG.yaml]").config) else 1
    return code.value


def prove(config: RunConfig) -> bool:
    """Run and print the whole table; whether all of it holds."""
    requested = requested_layout(config)
    pools: dict[int, WorkerPool] = {}

    def pool(world: int) -> WorkerPool:
        if world not in pools:
            pools[world] = WorkerPool(world)
        return pools[world]

    if requested == Layout():
        print("warning: no axis is above 1, so the engine is only compared in one process; give e.g. --tp 2 --pp 2")
    # A pipe has no width of its own: tensors are named in full there.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    try:
        parity = Parity(config, requested, pool)
        console.print(
            f"{requested}, float64, a model of {parity.shape.num_layers} layers, bound {BOUND:g} of each norm"
        )
        with console.status("running layouts"):
            rows = list(parity.rows())
    finally:
        for one in pools.values():
            one.close()
    console.print(table(rows))
    for row in rows:
        if not row.holds:
            console.print(f"{row.axis}: the first wrong tensor is {row.first_wrong}")
            console.print(f"{row.axis}: the smallest layout that fails is {row.smallest}")
    return all(row.holds for row in rows)


def requested_layout(config: RunConfig) -> Layout:
    """The degrees that the settings ask for."""
    parallel = config.parallel
    return Layout(
        tp=parallel.tensor,
        sequence=parallel.sequence and parallel.tensor > 1,
        pp=parallel.pipeline,
        dp=1 if parallel.data is None else parallel.data,
        micro_batch=config.train.micro_batch,
    )


def table(rows: Sequence[Row]) -> Table:
    """A row an axis: the layout, what it was held against, the worst tensor and its error."""
    out = Table("axis", "layout", "against", "worst tensor", "error", "")
    for row in rows:
        verdict = "[green]holds[/green]" if row.holds else "[red]FAILS[/red]"
        out.add_row(row.axis, str(row.layout), row.against, row.worst.tensor, f"{row.worst.error:.1e}", verdict)
    return out
