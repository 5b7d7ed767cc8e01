"""What all benchmarks share: the machine and code they ran on, timing in turns, and the file of their results."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from megatron_aquila.verify.page import write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "triton",
    "transformers",
    "liger-kernel",
    "flash-attn",
    "numpy",
    "tokenizers",
    "gigatoken",
    "orjson",
)

T = TypeVar("T")
Run = Callable[[], object]
Clock = Callable[[], float]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """What the benchmarks of a GPU have in common on the command line."""

    out: Path | None = None
    """File of the results; default benchmarks/results/NAME.json."""
    device: Literal["cuda", "cpu"] = "cuda"
    """A CPU is for trying the code out, together with --tiny."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Shapes so small that their figures mean nothing: none are written unless --out says where."""


def find_device(options: GpuOptions) -> torch.device | None:
    """Where to measure, a GPU with its number; None, and a line that says so, where the GPU is not there."""
    if options.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing is measured and nothing written")
        return None
    return torch.device("cuda", torch.cuda.current_device())


class Record:
    """The tables of one benchmark. The file is written again after every row: one cut short leaves what it found.

    Without ``out`` there is no file.
    """

    def __init__(
        self, benchmark: str, *, settings: object, device: torch.device, out: Path | None, free: tuple[str, ...] = ()
    ) -> None:
        self._out = out
        self._load_before = os.getloadavg()[0]
        self._head = {
            "benchmark": benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(device),
            "versions": versions(),
            "commit": commit(),
            "settings": json.loads(json.dumps(asdict(settings), default=str)),  # type: ignore[call-overload]
        }
        self.tables: dict[str, list[Row]] = {}
        self._free = free

    def go_on(self, *, without: str = "") -> None:
        """Take over the tables of the file that is there, but for the one ``without``; nothing where there is none.

        Raises ``SystemExit`` where it was measured on another machine, or of other code or settings: those but
        ``free``, which do not change what a row says.
        """
        if self._out is None or not self._out.exists():
            return
        found = json.loads(self._out.read_text(encoding="utf-8"))
        if apart := [name for name, value in self._origin(found).items() if value != self._origin(self._head)[name]]:
            raise SystemExit(f"{self._out} has another {' and '.join(apart)}: measure into another file, or move it")
        self.tables = {name: rows for name, rows in found["tables"].items() if name != without}
        self._load_before = found["load"]["before"]

    def _origin(self, head: Row) -> Row:
        """What must be the same where rows of two commands are in one file."""
        settings = {name: value for name, value in head["settings"].items() if name not in self._free}
        known = {"machine": head["machine"].get("gpu", head["machine"]["cpu"]), "versions": head["versions"]}
        return {"benchmark": head["benchmark"], **known, "commit": head["commit"], "settings": settings}

    def add(self, table: str, **row: Any) -> None:
        """One more row of ``table``: values that JSON can carry."""
        self.tables.setdefault(table, []).append(row)
        self._told(table, row)

    def put(self, table: str, key: str, **row: Any) -> None:
        """A row instead of the one of ``table`` with the same value under ``key``; where there is none, one more."""
        rows = self.tables.setdefault(table, [])
        places = [place for place, known in enumerate(rows) if known[key] == row[key]]
        place = places[0] if places else len(rows)
        rows[place : place + 1] = [row]
        self._told(table, row)

    def _told(self, table: str, row: Row) -> None:
        print(f"{table}: " + "  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            write(self._out, json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")

    def as_json(self) -> dict[str, Any]:
        """Everything, with the machine's load before the first row and now: processes that want a core, on average."""
        load = {"before": round(self._load_before, 2), "after": round(os.getloadavg()[0], 2)}
        return {**self._head, "load": load, "tables": self.tables}


def result_file(benchmark: str, options: GpuOptions) -> Path | None:
    """Where the results go: as asked for, or to the project's own unless they mean nothing."""
    if options.out is not None:
        return options.out
    return None if options.tiny else RESULTS / f"{benchmark}.json"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> Row:
    """What the benchmark ran on: names, cores and memory in GiB; of a GPU also its driver and its power limit."""
    found: Row = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1), **_driver()}
    return found


def cpu_name() -> str:
    """The processor's own name of itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()


def _driver() -> Row:
    """Of the first GPU that nvidia-smi knows, where that program is there."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.strip().split(", ")
    return dict(zip(("driver", "power_limit"), answer, strict=False))


def versions() -> Row:
    """Versions of what the figures depend on; packages that are not installed are left out."""
    # torch's own words: not every wheel's metadata name its build
    found: Row = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> Row:
    """The commit, and whether the code is as it is there; nulls where there is no repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    own = [":(exclude)benchmarks/results", ":(exclude)docs/benchmarks.md"]  # what a benchmark itself writes
    changes = git("status", "--porcelain", "--", ".", *own)
    return {"hash": git("rev-parse", "--short=12", "HEAD"), "is_dirty": None if changes is None else changes != ""}


def settle(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, *, device: torch.device, count: int, clock: Clock = time.perf_counter) -> list[float]:
    """Seconds of each of ``count`` calls in a row. A GPU's own clock is read: the host does not wait in between."""
    settle(device)
    if device.type != "cuda":
        times = [clock()]
        for _ in range(count):
            run()
            times.append(clock())
        return [stop - start for start, stop in pairwise(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    settle(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(marks)]


def in_turns(
    runs: Mapping[T, Run],
    *,
    device: torch.device,
    warmup: int,
    rounds: int,
    count: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[T, list[float]]:
    """Seconds of the calls of each of ``runs``, ``rounds`` times ``count``: what disturbs one disturbs all."""
    for run in runs.values():
        seconds_of(run, device=device, count=warmup)
    times: dict[T, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += seconds_of(run, device=device, count=count, clock=clock)
    return times


def sustained(run: Run, *, device: torch.device, seconds: float) -> float:
    """Seconds a call, on average over about ``seconds`` after as long a warm-up: clocks and heat have settled."""
    first = max(statistics.median(seconds_of(run, device=device, count=3)), 1e-7)
    count = max(3, round(seconds / first))
    seconds_of(run, device=device, count=count)
    return sum(seconds_of(run, device=device, count=count)) / count


def spread(times: list[float]) -> Row:
    """Median, smallest and largest of some seconds, and how many there are."""
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "calls": len(times),
    }


def options_of(kind: type[T], prog: str, argv: Sequence[str] | None) -> T:
    """The command line."""
    return tyro.cli(kind, args=sys.argv[1:] if argv is None else argv, prog=f"python -m benchmarks.{prog}")
