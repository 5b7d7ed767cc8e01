"""``python -m benchmarks.page``: docs/benchmarks.md from the results. What has none is said to be not measured."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common import RESULTS, ROOT, Row
from megatron_aquila.verify.page import markdown, write

PAGE = ROOT / "docs" / "benchmarks.md"
NOT_MEASURED = "*Not measured yet.*"
HEAD = """# Benchmarks

Made by `python -m benchmarks.page` from the files in `benchmarks/results/`, each of which one command writes with the
machine, the versions and the commit: `python -m benchmarks.ceilings`, `kernels`, `step`, `cpu`, `loader`,
`checkpoint`, `convert`, `index_build` or `preprocess`, all with `--help`. The first three need a GPU. Figures of
others, and of plans, are not on this page.

MFU is as in [numerics.md](numerics.md): the model's FLOPs, attention counted causally, over the dense peak. Seconds are
medians of calls taken in turns with what they are compared with. "Load" is how many processes wanted a core before and
after: where it is above the benchmark's own threads, other work ran beside it, and only ratios mean something.
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, the value of a row's that stands below it, its factor, and how many decimals it has; text as it is."""

    heading: str
    key: str
    factor: float = 1
    decimals: int = 1

    def cell(self, row: Row) -> str:
        """What the row has there; a dash for nothing."""
        value = row.get(self.key)
        if isinstance(value, float):
            return f"{value * self.factor:,.{self.decimals}f}"
        if isinstance(value, int) and not isinstance(value, bool):
            scaled = value * self.factor
            return f"{scaled:,.{self.decimals}f}" if self.factor != 1 else f"{value:,}"
        return "–" if value in (None, "") else str(value)


_STEP_SHAPE = ("model", "seq_len", "micro_batch", "recompute")

TABLES: Mapping[str, Mapping[str, tuple[Column, ...]]] = MappingProxyType(
    {
        "ceilings": {
            "copy": (Column("MiB", "mib"), Column("TB/s", "tbytes_per_second", 1, 2)),
            "gemm": (
                Column("model", "model"),
                Column("linear", "linear"),
                Column("product", "product"),
                Column("tokens", "tokens"),
                Column("out", "n"),
                Column("in", "k"),
                Column("TFLOP/s", "tflops"),
            ),
            "attention": (
                Column("model", "model"),
                Column("backend", "backend"),
                Column("S", "seq_len"),
                Column("B", "batch"),
                Column("direction", "direction"),
                Column("TFLOP/s", "tflops"),
                Column("", "error"),
            ),
        },
        "kernels": {
            "kernels": (
                Column("model", "model"),
                Column("op", "op"),
                Column("kernel", "name"),
                Column("direction", "direction"),
                Column("µs", "seconds", 1e6),
                Column("rate", "rate", 1, 2),
                Column("", "unit"),
                Column("largest error, 1e-6", "largest_error", 1e6, 2),
                Column("", "error"),
            ),
        },
        "step": {
            "step": (
                Column("model", "model"),
                Column("S", "seq_len"),
                Column("B", "micro_batch"),
                Column("our recompute", "recompute"),
                Column("who", "name"),
                Column("their checkpointing", "checkpointing"),
                Column("ms a step", "seconds", 1e3),
                Column("steps", "calls"),
                Column("tokens/s", "tokens_per_second", 1, 0),
                Column("MFU, %", "mfu", 100),
                Column("of the bf16 peak (fp8), %", "bf16_equivalent", 100),
                Column("GiB", "peak_gib"),
                Column("our plan, GiB", "planned_gib"),
                Column("of the best transformers", "ratio", 1, 2),
                Column("", "error"),
            ),
            "left out": tuple(Column(key, key) for key in (*_STEP_SHAPE, "why")),
        },
        "cpu": {
            "step": (
                Column("who", "name"),
                Column("ms", "seconds", 1e3),
                Column("fastest", "fastest", 1e3),
                Column("slowest", "slowest", 1e3),
                Column("calls", "calls"),
                Column("tokens/s", "tokens_per_second", 1, 0),
                Column("of the matmul's rate, %", "gemm_share", 100),
                Column("of the best transformers", "ratio", 1, 2),
            ),
            "ops": (
                Column("forward and backward of one token", "name"),
                Column("ours, µs", "ours_us"),
                Column("plain torch or transformers, µs", "theirs_us"),
            ),
            "traffic": (
                Column("8 ranks", "layout"),
                Column("all-reduce", "all_reduce"),
                Column("all-gather", "all_gather"),
                Column("reduce-scatter", "reduce_scatter"),
                Column("all-to-all", "all_to_all"),
                Column("messages", "messages"),
                Column("MiB moved", "num_bytes", 2**-20),
                Column("MiB sent", "sent_bytes", 2**-20),
            ),
        },
        "loader": {
            "data set": (
                Column("documents", "documents"),
                Column("tokens", "tokens"),
                Column("s to write", "seconds_to_write"),
            ),
            "start-up": (
                Column("S", "seq_len"),
                Column("start", "start"),
                Column("samples", "samples"),
                Column("s to the first microbatch", "seconds", 1, 2),
                Column("peak GiB", "peak_memory_gib", 1, 2),
                Column("of which imports", "memory_before_gib", 1, 2),
            ),
            "reading": (
                Column("S", "seq_len"),
                Column("reader", "reader"),
                Column("rules for documents", "rules"),
                Column("samples/s", "samples_per_second", 1, 0),
                Column("million tokens/s", "tokens_per_second", 1e-6, 2),
                Column("turns", "calls"),
                Column("own memory, GiB", "own_memory_gib", 1, 2),
            ),
        },
        "checkpoint": {
            "saving": (
                Column("written", "name"),
                Column("MB", "num_bytes", 1e-6, 0),
                Column("s that training stands still", "stall_seconds", 1, 2),
                Column("the first save", "first_stall", 1, 2),
                Column("longest", "longest_stall", 1, 2),
                Column("in plain copies", "stall_in_copies", 1, 1),
                Column("s until it is published", "seconds", 1, 2),
                Column("saves", "calls"),
            ),
        },
        "convert": {
            "converting": (
                Column("conversion", "name"),
                Column("GB of weights", "num_bytes", 1e-9),
                Column("seconds", "seconds"),
                Column("in plain copies of the files", "in_copies"),
                Column("own memory, GB", "own_bytes", 1e-9, 2),
            ),
        },
        "index_build": {
            "building": (
                Column("who", "name"),
                Column("samples", "samples"),
                Column("CPU seconds", "cpu_seconds"),
                Column("seconds", "seconds"),
                Column("peak MiB", "peak_mib"),
            ),
        },
        "preprocess": {
            "start-up": (
                Column("seconds", "seconds", 1, 2),
                Column("CPU seconds", "cpu_seconds", 1, 2),
                Column("peak MiB, all processes", "peak_mib", 1, 0),
                Column("slowest", "slowest", 1, 2),
                Column("runs", "calls"),
            ),
            "corpora": (
                Column("corpus", "corpus"),
                Column("MB", "megabytes"),
                Column("documents", "documents"),
                Column("tokens", "tokens"),
                Column("seconds", "seconds", 1, 2),
                Column("MB/s", "megabytes_per_second"),
                Column("CPU seconds", "cpu_seconds", 1, 2),
                Column("MB per CPU second", "megabytes_per_cpu_second"),
                Column("peak MiB, all processes", "peak_mib", 1, 0),
                Column("backend", "backend"),
                Column("slowest", "slowest", 1, 2),
                Column("runs", "calls"),
            ),
        },
    }
)

ABOUT: Mapping[str, str] = MappingProxyType(
    {
        "ceilings": """\
What the GPU gives for the products, copies and attention of the 7B and the 34B, sustained on random data.""",
        "kernels": """\
Each kernel against its reference in plain torch, the same under torch.compile, and liger-kernel where it is installed.
The error is the largest difference from float64, as a share of the tensor's largest value.""",
        "step": """\
Whole steps, with data, clipping, AdamW and the report, against transformers' LlamaForCausalLM of the same shape with
SDPA, fused AdamW and torch.compile, in one run.""",
        "cpu": """\
The step of a model of 4 layers of 256 against transformers, what an op costs beside its arithmetic, and what 8 ranks
say in a step of the same 32 samples: planned by `plan/traffic.py`, and counted on fake ranks to be just that.""",
        "loader": """\
Start-up and reading of documents whose lengths are log-normal, in one thread: samples from all over the data, in
microbatches of 4; where megatron-core is installed, its GPTDataset in turns, sample by sample. Peak memory counts the
mapped files' pages that were touched.""",
        "checkpoint": """\
One rank's state, saved to a local disk at once and from a copy in host memory while training goes on, in turns with
plain copies of the same tensors.""",
        "convert": """\
`aquila convert` on the 34B's sizes with few of its 60 layers, random weights in bf16, each command in a process of its
own. Own memory is what is no file's page, at its peak. Every conversion reads all tensors back; the largest tensor is
1.2 GB, twice that in fp32.""",
        "index_build": """\
Document order, sample index and sample order of a data set, built and written: ours, and Megatron-LM's way repeated in
numpy (its sample index is C++ too, ours in both).""",
        "preprocess": """\
JSON lines to token files by `aquila preprocess`, from the start of the command to closed and hashed files with their
manifest: corpora, and one document alone for what starting takes. The fastest of the runs, with the corpus in memory;
CPU seconds are of all processes together, and memory that several share is counted once.""",
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    assert not (sys.argv[1:] if argv is None else argv), "the page has no options"
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
        parts = [part for result in found if result["benchmark"] == benchmark for part in _result(result)]
        sections += parts or [f"{NOT_MEASURED}\n"]
    return "\n".join(sections)


def _result(result: Row) -> Iterator[str]:
    """What one file says: where it was measured, and its tables."""
    yield f"{_origin(result)}\n"
    for name, columns in TABLES[result["benchmark"]].items():
        rows = with_ratios(result["tables"].get(name, []))
        if rows:
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


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of steps, ours with its speed as a multiple of the fastest of transformers' at the same shape."""

    def shape(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in _STEP_SHAPE)

    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if str(row.get("name", "")).startswith("transformers") and row.get("tokens_per_second"):
            best[shape(row)] = max(best.get(shape(row), 0.0), row["tokens_per_second"])
    return [
        row | {"ratio": row["tokens_per_second"] / best[shape(row)]}
        if str(row.get("name")).startswith("megatron_aquila") and row.get("tokens_per_second") and shape(row) in best
        else row
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
