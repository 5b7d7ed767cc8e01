"""``python -m benchmarks.preprocess``: text to token files by the command a user gives, start to closed, hashed files.

Each corpus is made into a data set by ``aquila preprocess`` in a process of its own, in turns with the others; and a
corpus of one document shows what starting takes. Where megatron-core is installed, the beginning of the first corpus is
also made into one by its builder, in turns with ours.
"""

import hashlib
import json
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

from benchmarks import megatron_core
from benchmarks.common import RESULTS, ROOT, Record, Row, options_of
from megatron_aquila.data.manifest import read_manifest
from megatron_aquila.data.tokenizer import library_of, tokenizer_at

ONE_DOCUMENT = '{"text": "One document."}\n'
OURS, PEER = "megatron_aquila", "megatron-core"
PAUSE = 0.1  # seconds between looks at the memory
CHILD = re.compile(r"\d+")
TOKENIZER_FILES = {
    "--vocab-file": "vocab.json",
    "--merge-file": "merges.txt",
    "--special-tokens-file": "special_tokens.txt",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Speed and memory of preprocessing corpora of JSON lines."""

    input: tuple[Path, ...]
    """Corpora, each measured on its own."""
    tokenizer: Path
    """Folder of Aquila's vocab.json, merges.txt and special_tokens.txt; or a tokenizer.json, or its folder."""
    out: Path | None = None
    """File of the results; default benchmarks/results/preprocess.json."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenize."""
    backend: str = "auto"
    """As --tokenizer-backend."""
    rounds: int = 3
    """Times that each corpus is made into a data set; the fastest counts, as the file is in memory then."""
    peer_megabytes: float = 50.0
    """Of the first corpus, made beside megatron-core where it is installed; 0: not."""
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
        measure_corpora(record, options, Path(name))
        if megatron_core.IS_INSTALLED and options.peer_megabytes > 0:
            measure_peer(record, options, Path(name))
    return 0


def measure_corpora(record: Record, options: Options, folder: Path) -> None:
    """A row for each corpus, and for one of a single document."""
    one = folder / "one_document.jsonl"
    one.write_text(ONE_DOCUMENT)
    found: dict[Path, list[Row]] = {corpus: [] for corpus in (one, *options.input)}
    for _ in range(options.rounds):
        for corpus, rows in found.items():
            rows.append(measured(corpus, options, folder / "made"))
            if corpus is one:
                record.put("start-up", "corpus", corpus=corpus.stem, **fastest(rows))
            else:
                row = fastest(rows) | behind(fastest(rows), fastest(found[one]))
                record.put("corpora", "corpus", corpus=corpus.stem, **row)


def fastest(rows: Sequence[Row]) -> Row:
    """The row that took least, with what the slowest took and how many there are."""
    best = min(rows, key=lambda row: float(row["seconds"]))
    return {**best, "slowest": max(row["seconds"] for row in rows), "calls": len(rows)}


def behind(row: Row, start: Row) -> Row:
    """The speed when the seconds that starting takes are left out; nothing where it took no longer than that."""
    seconds = row["seconds"] - start["seconds"]
    return {"megabytes_per_second_behind_start": row["megabytes"] / seconds} if seconds > 0 else {}


def measure_peer(record: Record, options: Options, folder: Path) -> None:
    """A row for ours and one for megatron-core's: the same part, tokenizer and number of processes.

    Ours lets special tokens in the text count as such, as Megatron-LM does; whether the files are equal is told.
    """
    part = folder / f"{options.input[0].stem}.jsonl"
    num_documents = write_part(options.input[0], part, round(options.peer_megabytes * 1e6))
    tokenizer = library_of(tokenizer_at(options.tokenizer))
    assert tokenizer.eod is not None, f"{options.tokenizer} has no token that ends a document"
    described = folder / "tokenizer.json"
    described.write_text(json.dumps(tokenizer.description), encoding="utf-8")
    theirs, megabytes = folder / "theirs", part.stat().st_size / 1e6
    flags: dict[str, object] = {
        "--input": part,
        "--output": theirs,
        "--workers": options.workers,
        "--tokenizer": described,
    }
    flags |= {"--eod": tokenizer.eod, "--vocab-size": tokenizer.vocab_size}
    command = [sys.executable, "-m", "benchmarks.megatron_preprocess"]
    command += [str(word) for pair in flags.items() for word in pair]
    found: dict[str, list[Row]] = {PEER: [], OURS: []}
    for _ in range(options.rounds):
        found[PEER].append(timed(command)[0] | {"documents": num_documents})
        found[OURS].append(measured(part, options, folder / "made", "--allow-special-tokens"))
        rows = {who: fastest(rows) for who, rows in found.items()}
        are_equal = all(
            digest(theirs.with_suffix(end)) == digest(folder / f"made_text_document{end}") for end in (".bin", ".idx")
        )
        for who, row in rows.items():
            shared = {"corpus": part.stem, "megabytes": megabytes, "megabytes_per_second": megabytes / row["seconds"]}
            ratio = rows[PEER]["seconds"] / row["seconds"] if who == OURS else None
            record.put("beside megatron-core", "name", name=who, **row | shared, ratio=ratio, same_files=are_equal)


def write_part(corpus: Path, part: Path, num_bytes: int) -> int:
    """Write the first whole lines of a corpus, about ``num_bytes``; returns how many."""
    with corpus.open("rb") as file:
        lines = file.readlines(num_bytes)
    part.write_bytes(b"".join(lines))
    return len(lines)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measured(corpus: Path, options: Options, prefix: Path, *more: str) -> Row:
    """One run of our command: what ``timed`` says of it, and what it made."""
    command = [sys.executable, "-m", "megatron_aquila", "preprocess", "--input", str(corpus), "--append-eod"]
    command += ["--output-prefix", str(prefix), "--overwrite", "--workers", str(options.workers)]
    command += ["--tokenizer-backend", options.backend, *tokenizer_flags(options.tokenizer), *more]
    times, said = timed(command)
    manifest = read_manifest(f"{prefix}_text_document")
    assert manifest is not None, f"{prefix} has no manifest"
    num_bytes = corpus.stat().st_size
    return {
        "megabytes": num_bytes / 1e6,
        "documents": manifest.contents.documents,
        "tokens": manifest.contents.tokens,
        "megabytes_per_second": num_bytes / 1e6 / times["seconds"],
        "megabytes_per_cpu_second": num_bytes / 1e6 / times["cpu_seconds"],
        **times,
        "bin_sha256": manifest.contents.bin.sha256[:12],
        "backend": said.partition("tokenizer backend: ")[2].partition(":")[0].split(",")[0].strip(),
    }


def tokenizer_flags(tokenizer: Path) -> list[str]:
    """The command's flags for Aquila's three files, or for a tokenizer.json."""
    if not all((tokenizer / name).is_file() for name in TOKENIZER_FILES.values()):
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    files = {flag: tokenizer / name for flag, name in TOKENIZER_FILES.items()}
    return [str(word) for pair in files.items() for word in pair]


def timed(command: Sequence[str]) -> tuple[Row, str]:
    """Wall and CPU seconds of a command, the memory that all of its processes take, and what it said.

    Python may keep what it compiles, as where a package is installed: the next run finds it.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak: list[int] = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    _, said = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}: {said}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak[0] / 2**20}, said


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
