"""``python -m benchmarks.loader``: start-up and tokens a second of the data loader over ten million documents."""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks import megatron_core
from benchmarks.common import RESULTS, Record, Row, Run, in_turns, options_of, spread
from megatron_aquila.data.blend import build_datasets
from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.loader import BatchLoader
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.plan.batches import ReplicaShare
from megatron_aquila.train.build import host_batch

CPU = torch.device("cpu")
VOCAB_SIZE, EOD = 100008, 100007  # Aquila's; its tokens take 4 bytes
BLOCK = 1 << 16  # documents written at once
MICRO_BATCH = 4
SEED = 1234
OURS, PEER = "megatron_aquila", "megatron-core"

APART = DocumentRules(eod=EOD, reset_positions=True, reset_attention=True, mask_loss=True)
RULES: Mapping[str, DocumentRules | None] = MappingProxyType(
    {
        "plain": None,
        "--reset-position-ids --eod-mask-loss": replace(APART, reset_attention=False),
        "all three resets": APART,
    }
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Start-up and speed of the data loader over a data set, by default a synthetic one in a temporary folder.

    Where megatron-core is installed, its data set reads the same samples in turns with ours.
    """

    out: Path | None = None
    """File of the results; default benchmarks/results/loader.json."""
    data: Path | None = None
    """Prefix of a data set to read instead of a synthetic one, tokenized with Aquila's tokenizer and --append-eod."""
    documents: int = 10_000_000
    """Documents of the synthetic data set."""
    mean_tokens: int = 100
    """Tokens of a document, end included, on average; their lengths are log-normal."""
    seq_lens: tuple[int, ...] = (2048, 4096)
    """Lengths of a sample."""
    epochs: int = 1
    """Times that the samples of a run pass over the data."""
    rounds: int = 10
    """Turns of reading that each way gets."""
    batch: int = 64
    """Samples read in a turn."""
    folder: Path | None = None
    """Where the temporary folder is made: 4 bytes a token are needed."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A thousand documents: figures that mean nothing, which are not written unless --out says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "loader", argv)
    if options.tiny:
        options = replace(options, documents=1000, seq_lens=(64,), batch=8)
    out = options.out if options.out is not None or options.tiny else RESULTS / "loader.json"
    record = Record("loader", settings=options, device=CPU, out=out)
    with tempfile.TemporaryDirectory(prefix="aquila_loader_", dir=options.folder) as name:
        prefix = Path(name) / "synthetic" if options.data is None else options.data
        started = time.perf_counter()
        if options.data is None:
            write_documents(prefix, options)
            record.add("data set", **size_of(prefix), seconds_to_write=time.perf_counter() - started)
        else:
            record.add("data set", **size_of(prefix))
        options = replace(options, folder=Path(name))  # where the indices are built
        for seq_len in options.seq_lens:
            for start in ("first, builds the indices", "later"):
                record.add("start-up", seq_len=seq_len, start=start, **apart(start_up, prefix, seq_len, options))
            for row in apart(read, prefix, seq_len, options):
                record.add("reading", seq_len=seq_len, **row)
    return 0


def write_documents(prefix: Path, options: Options) -> int:
    """Write the data set: random tokens, each document ended by ``EOD``. Returns its number of tokens."""
    random = np.random.default_rng(0)
    sigma = 1.0  # of the lengths' logarithm: the longest in a million is some 70 times the mean
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for start in range(0, options.documents, BLOCK):
            count = min(BLOCK, options.documents - start)
            drawn = random.lognormal(np.log(options.mean_tokens) - sigma**2 / 2, sigma, count)
            lengths = np.maximum(1, np.rint(drawn)).astype(np.int64)
            tokens = random.integers(EOD, size=int(lengths.sum()), dtype=np.int32)
            tokens[np.cumsum(lengths) - 1] = EOD
            writer.add_documents(tokens, lengths)
        return writer.num_tokens


def size_of(prefix: Path) -> Row:
    """Documents and tokens of a data set."""
    dataset = IndexedDataset(prefix)
    return {"documents": len(dataset.document_indices) - 1, "tokens": len(dataset.tokens)}


def apart(measure: Callable[..., Any], *args: Any) -> Any:
    """``measure(*args)`` in a process of its own, whose peak memory is then that of this alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, *args).result()


def samples_of(prefix: Path, seq_len: int, options: Options) -> SampleSource:
    """The run's samples, their indices built where they are not there yet."""
    size = None
    if options.epochs > 1:
        size = options.epochs * options.documents * options.mean_tokens // seq_len
    source = build_datasets(
        [str(prefix)],
        sizes=(size, None, None),
        split="1",
        seq_len=seq_len,
        seed=SEED,
        cache_path=None if options.folder is None else options.folder / "cache",
    ).train
    assert source is not None, "a split that is all training has training samples"
    return source


def start_up(prefix: Path, seq_len: int, options: Options) -> Row:
    """Seconds until the first microbatch is there, imports left out, and what they took of memory."""
    before = peak_bytes()
    started = time.perf_counter()
    source = samples_of(prefix, seq_len, options)
    opened = time.perf_counter() - started
    _loader(source, None).fetch(0, MICRO_BATCH)
    return {
        "samples": len(source),
        "seconds": time.perf_counter() - started,
        "seconds_to_open": opened,
        "memory_before_gib": before / 2**30,
        "peak_memory_gib": peak_bytes() / 2**30,
    }


def read(prefix: Path, seq_len: int, options: Options) -> list[Row]:
    """A row a reader and rule: one thread in turns, its seconds those of the CPU. The samples lie all over the data.

    The file is in memory before, but each way reads samples that no other has touched: whoever touches a page first
    has it mapped. megatron-core's samples are tensors of one sample, ours of microbatches.
    """
    source = samples_of(prefix, seq_len, options)
    read_through(Path(f"{prefix}.bin"))
    makes: dict[tuple[str, str], Callable[[Iterator[int]], Run]] = {}
    for name, rules in RULES.items():
        makes[OURS, name] = partial(_reading, source, rules, options.batch)
    if megatron_core.IS_INSTALLED:
        makes |= {
            (PEER, name): partial(_peer, samples, options.batch) for name, samples in _peers(prefix, seq_len, options)
        }
    stride = len(makes) * options.batch
    runs: dict[tuple[str, str], Run] = {}
    for place, (way, make) in enumerate(makes.items()):
        runs[way] = make(iter(range(place * options.batch, len(source), stride)))
    for (reader, _), run in runs.items():
        if reader == OURS:
            run()
    memory = own_bytes()
    rounds = min(options.rounds, len(source) // stride - 2)
    times = in_turns(runs, device=CPU, warmup=1, rounds=rounds, clock=time.process_time)
    rates = {way: options.batch / statistics.median(seconds) for way, seconds in times.items()}
    return [
        {
            "reader": reader,
            "rules": name,
            **spread(seconds),
            "samples_per_second": rates[reader, name],
            "tokens_per_second": rates[reader, name] * seq_len,
            "ratio": rates[OURS, name] / rates[PEER, name] if reader == OURS and (PEER, name) in rates else None,
            "own_memory_gib": memory / 2**30 if reader == OURS else None,
        }
        for (reader, name), seconds in times.items()
    ]


def _peers(prefix: Path, seq_len: int, options: Options) -> Iterator[tuple[str, Sequence[object]]]:
    """megatron-core's samples, under the rules that it can follow without a dense mask."""
    cache = prefix.parent if options.folder is None else options.folder
    for name, rules in RULES.items():
        if rules is None or not rules.reset_attention:
            yield (
                name,
                megatron_core.gpt_dataset(prefix, seq_len=seq_len, seed=SEED, cache=cache, rules=rules, eod=EOD),
            )


def _peer(samples: Sequence[object], batch: int, positions: Iterator[int]) -> Run:
    def run() -> list[object]:
        start = next(positions)
        return [samples[number] for number in range(start, start + batch)]

    return run


def read_through(path: Path) -> None:
    """Have a file's pages in memory."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def _reading(source: SampleSource, rules: DocumentRules | None, batch: int, positions: Iterator[int]) -> Run:
    loader = _loader(source, rules)
    return lambda: loader.fetch(next(positions), batch)


def _loader(source: SampleSource, rules: DocumentRules | None) -> BatchLoader[Batch]:
    """A loader that reads in the calling thread, nothing ahead."""
    return BatchLoader(
        source,
        share=ReplicaShare(size=MICRO_BATCH, round_size=MICRO_BATCH),
        vocab_size=VOCAB_SIZE,
        prepare=host_batch,
        documents=rules,
    )


def peak_bytes() -> int:
    """The most resident memory this process ever had, the mapped files' pages that it touched included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def own_bytes() -> int:
    """Resident memory of this process now without mapped files, whose pages the system may take back."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return peak_bytes()


if __name__ == "__main__":
    sys.exit(main())
