"""``python -m benchmarks.page``: docs/benchmarks.md from the results. What has none is said to be not measured."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, Row
from benchmarks.shares import with_ceilings, with_ratios
from benchmarks.tables import ABOUT, TABLES
from megatron_aquila.verify.page import markdown, write

PAGE = ROOT / "docs" / "benchmarks.md"
NOT_MEASURED = "*Not measured yet.*"
NOT_SO = "*Measured in another way; to be measured again.*"
HEAD = """# Benchmarks

Made by `python -m benchmarks.page` from the files in `benchmarks/results/`, each of which one command writes with the
machine, the versions and the commit: `python -m benchmarks.NAME` with a section's name, and `--help` for its options.
`ceilings`, `kernels`, `step` and `fp8` need a GPU and measure nothing without one. Figures of others, and of plans, are
not on this page.

With little GPU time, in this order; what has `--resume` goes on where it was cut short:

```bash
python -m benchmarks.ceilings
python -m benchmarks.step --minutes 9 --resume
python -m benchmarks.step --models 7b --seq-lens 2048 --micro-batches 4 --microbatches 32 --rounds 1 --steps 20 \\
    --recompute none --only-ours --ours chosen --no-loop --out benchmarks/results/step_256k.json
python -m benchmarks.step --models 7b --micro-batches 4 --seq-lens 2048 --recompute none --precision fp8 \\
    --only-ours --ours chosen --out benchmarks/results/step_fp8.json
python -m benchmarks.kernels --resume
python -m benchmarks.fp8
```

A GPU's image often has torch and little else. Where it reaches no package index, carry along the wheels that
`pip download .` finds, torch's left out: without tyro, pydantic and what these need no command starts.

MFU is as in [numerics.md](numerics.md): the model's FLOPs, attention counted causally, over the dense peak. Seconds are
medians of calls taken in turns with what they are compared with. "Load" is how many processes wanted a core before and
after: where it is above the benchmark's own threads, other work ran beside it, and only ratios mean something.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    about = "Write docs/benchmarks.md from the files in benchmarks/results; there are no options."
    ArgumentParser(prog="python -m benchmarks.page", description=about).parse_args(argv)
    write(PAGE, page(results(RESULTS)))
    print(f"{PAGE.relative_to(ROOT)} is written")
    return 0


def results(folder: Path) -> list[Row]:
    """What the files of a folder hold, in the order of their names; what was measured on tiny shapes means nothing."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for result in found:
        assert not result["settings"]["tiny"], f"results of {result['benchmark']} on tiny shapes are no figures"
    return found


def page(found: Sequence[Row]) -> str:
    """The whole page."""
    sections = [HEAD]
    for benchmark, about in ABOUT.items():
        sections.append(f"## {benchmark}\n\n{about}\n")
        results_here = [with_ceilings(result, found) for result in found if result["benchmark"] == benchmark]
        parts = [part for result in results_here for part in _result(result)]
        sections += parts or [f"{NOT_MEASURED}\n"]
    return "\n".join(sections)


def _result(result: Row) -> Iterator[str]:
    """What one file says: where it was measured, and its tables."""
    yield f"{_origin(result)}\n"
    for name, columns in TABLES[result["benchmark"]].items():
        rows = with_ratios(result["tables"].get(name, []))
        if any(column.is_needed and column.key not in row for column in columns for row in rows):
            yield f"**{name}**\n\n{NOT_SO}\n"
        elif rows:
            shown = [column for column in columns if any(column.cell(row) != "–" for row in rows)]
            table = markdown([column.heading for column in shown], [[c.cell(row) for c in shown] for row in rows])
            yield f"**{name}**\n\n{table}\n"


def _origin(result: Row) -> str:
    machine, commit, load = result["machine"], result["commit"], result["load"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB"
    if "gpu" in machine:
        limits = [machine[key] for key in ("driver", "power_limit") if key in machine]
        where = ", ".join([f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB", *limits, where])
    state = {None: "", True: " with changes", False: ""}[commit["is_dirty"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = ", ".join(f"{name} {_spelled(value)}" for name, value in result["settings"].items() if name != "out")
    return "\n".join(
        [
            f"- {where}; load {load['before']} before, {load['after']} after",
            f"- {versions}",
            f"- commit {commit['hash'] or 'unknown'}{state}, {result['date']}",
            f"- {settings}",
        ]
    )


def _spelled(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
