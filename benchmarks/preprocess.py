"""``python -m benchmarks.preprocess``: text to token files by the command a user gives, start to closed, hashed files.

Each corpus is made into a data set by ``aquila preprocess`` in a process of its own, in turns with the others; and a
corpus of one document shows what starting takes.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from benchmarks.common import RESULTS, ROOT, Record, Row, options_of
from megatron_aquila.data.manifest import read_manifest

ONE_DOCUMENT = '{"text": "One document."}\n'
PAUSE = 0.1  # seconds between looks at the memory
CHILD = re.compile(r"\d+")
TOKENIZER_FILES = {
    "--vocab-file": "vocab.json",
    "--merge-file": "merges.txt",
    "--special-tokens-file": "special_tokens.txt",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Speed and memory of preprocessing corpora of JSON lines with Aquila's tokenizer."""

    input: tuple[Path, ...]
    """Corpora, each measured on its own."""
    tokenizer: Path
    """Folder of vocab.json, merges.txt and special_tokens.txt."""
    out: Path | None = None
    """File of the results; default benchmarks/results/preprocess.json."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenize."""
    backend: str = "auto"
    """As --tokenizer-backend."""
    rounds: int = 3
    """Times that each corpus is made into a data set; the fastest counts, as the file is in memory then."""
    folder: Path | None = None
    """Where the temporary folder of the output is made."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Corpora so small that their figures mean nothing, which are not written unless --out says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "preprocess", argv)
    out = options.out if options.out is not None or options.tiny else RESULTS / "preprocess.json"
    named = replace(
        options,
        input=tuple(Path(path.name) for path in options.input),
        tokenizer=Path(options.tokenizer.name),
        folder=None,
    )
    record = Record("preprocess", settings=named, device=torch.device("cpu"), out=out)
    with tempfile.TemporaryDirectory(prefix="aquila_preprocess_", dir=options.folder) as name:
        one = Path(name) / "one_document.jsonl"
        one.write_text(ONE_DOCUMENT)
        corpora = (one, *options.input)
        found: dict[Path, list[Row]] = {corpus: [] for corpus in corpora}
        for _ in range(options.rounds):
            for corpus, rows in found.items():
                rows.append(measured(corpus, options, Path(name) / "made"))
                best = min(rows, key=lambda row: float(row["seconds"]))
                slowest = max(row["seconds"] for row in rows)
                table = "start-up" if corpus is one else "corpora"
                record.put(table, "corpus", corpus=corpus.stem, **best, slowest=slowest, calls=len(rows))
    return 0


def measured(corpus: Path, options: Options, prefix: Path) -> Row:
    """One run of the command: wall and CPU seconds, the memory that all of its processes take, and what it made."""
    files = {flag: options.tokenizer / name for flag, name in TOKENIZER_FILES.items()}
    command = [sys.executable, "-m", "megatron_aquila", "preprocess", "--input", str(corpus), "--append-eod"]
    command += ["--output-prefix", str(prefix), "--overwrite", "--workers", str(options.workers)]
    command += ["--tokenizer-backend", options.backend, *(str(word) for pair in files.items() for word in pair)]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak: list[int] = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    _, said = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}: {said}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    manifest = read_manifest(f"{prefix}_text_document")
    assert manifest is not None, f"{prefix} has no manifest"
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    num_bytes = corpus.stat().st_size
    return {
        "megabytes": num_bytes / 1e6,
        "documents": manifest.contents.documents,
        "tokens": manifest.contents.tokens,
        "seconds": seconds,
        "megabytes_per_second": num_bytes / 1e6 / seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes_per_cpu_second": num_bytes / 1e6 / cpu_seconds,
        "peak_mib": peak[0] / 2**20,
        "bin_sha256": manifest.contents.bin.sha256[:12],
        "backend": said.partition("tokenizer backend: ")[2].partition(":")[0].split(",")[0].strip(),
    }


def _watch(process: "subprocess.Popen[str]", peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(proportional_bytes, tree(process.pid))))
        time.sleep(PAUSE)


def tree(pid: int) -> list[int]:
    """A process and all below it that are there now."""
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        except OSError:
            continue
        found += map(int, CHILD.findall(children))
    return found


def proportional_bytes(pid: int) -> int:
    """Resident memory of a process, pages that several share counted in parts; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    sys.exit(main())
