"""``python -m benchmarks.index_build``: building the index of a large data set, ours and numpy's way as Megatron-LM's.

Each contestant builds in a process of its own. The peer's order of documents (``mgrid``, ``RandomState.shuffle``), its
shuffle of samples and its arrays, all in memory, are repeated here in numpy; the sample index is ours in both, for the
peer's is C++ as well.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import write_manifest
from megatron_aquila.data.native import INDEX_BUILDER, fill_sample_index
from megatron_aquila.data.samples import PackedSamples, Packing

if TYPE_CHECKING:
    import torch

SEQ_LEN, SEED, MEAN_TOKENS = 2048, 1234, 1011


def write_lengths(prefix: Path, documents: int) -> None:
    """A data set of ``documents`` with lognormal lengths, its tokens a hole in the file."""
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, documents).astype(np.int64) + 1
    writer = IndexedDatasetWriter(prefix, np.uint8)
    writer._lengths.frombytes(lengths.astype(np.int32).tobytes())
    writer._boundaries.frombytes(np.arange(1, documents + 1, dtype=np.int64).tobytes())
    manifest = writer.close()
    os.truncate(f"{prefix}.bin", int(lengths.sum()))
    said = manifest.contents  # the index is hashed there, as any set's of ours is
    tokens = int(lengths.sum())
    contents = replace(said, tokens=tokens, bin=replace(said.bin, size=tokens))
    write_manifest(prefix, replace(manifest, contents=contents))


def build_ours(prefix: Path, epochs: int) -> int:
    """Open, build, publish; returns the number of samples."""
    dataset = IndexedDataset(prefix)
    samples = wanted(dataset, epochs)
    packing = Packing(first=0, end=len(dataset), num_samples=samples, seq_len=SEQ_LEN, seed=SEED)
    folder = Path(tempfile.mkdtemp(dir=prefix.parent))
    return len(PackedSamples(dataset, packing, IndexCache(folder=folder), split="train"))


def build_numpy(prefix: Path, epochs: int) -> int:
    """The same arrays as Megatron-LM's Python makes them."""
    dataset = IndexedDataset(prefix)
    samples = wanted(dataset, epochs)
    random = np.random.RandomState(SEED)
    documents = np.mgrid[0:epochs, 0 : len(dataset)][1]
    documents[:] = np.arange(len(dataset), dtype=np.int32)
    documents = documents.reshape(-1).astype(np.int32)
    random.shuffle(documents)
    sample_index = np.zeros((samples + 1, 2), dtype=np.int32)
    fill_sample_index(np.array(dataset.sequence_lengths), documents, SEQ_LEN, (0, 0), sample_index[1:])
    order = np.arange(samples, dtype=np.uint32)
    random.shuffle(order)
    for name, values in (("documents", documents), ("samples", sample_index), ("order", order)):
        np.save(prefix.parent / f"{name}.npy", values)
    return len(order)


def wanted(dataset: IndexedDataset, epochs: int) -> int:
    """All whole samples of so many epochs, so that the last is not shuffled on its own."""
    return (epochs * int(dataset.sequence_lengths.sum(dtype=np.int64)) - 1) // SEQ_LEN


CONTESTANTS: dict[str, Callable[[Path, int], int]] = {"megatron_aquila": build_ours, "numpy": build_numpy}


def measure(contestant: str, prefix: Path, epochs: int) -> dict[str, Any]:
    """In this process: seconds, CPU seconds, and its peak memory."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    samples = CONTESTANTS[contestant](prefix, epochs)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage's peak is also the forking parent's
    [peak] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    return {
        "name": contestant,
        "builder": INDEX_BUILDER,
        "samples": samples,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": peak // 1024,
    }


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time and memory of building the index of a large data set: ours, and numpy's way as Megatron-LM goes it."""

    out: Path | None = None
    """File of the results; default benchmarks/results/index_build.json."""
    documents: int = 10_000_000
    """Documents of the data set; their lengths are log-normal."""
    epochs: int = 4
    """Times that the samples pass over the data."""
    rounds: int = 2
    """Times that each contestant builds, in turns."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A thousand documents: figures that mean nothing, which are not written unless --out says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    from benchmarks.common import RESULTS, Record, options_of  # they import torch, whose memory is not the index's

    options = options_of(Options, "index_build", argv)
    if options.tiny:
        options = replace(options, documents=1000)
    out = options.out if options.out is not None or options.tiny else RESULTS / "index_build.json"
    record = Record("index_build", settings=options, device=torch_cpu(), out=out)
    with tempfile.TemporaryDirectory(prefix="aquila_index_") as folder:
        prefix = Path(folder) / "data"
        write_lengths(prefix, options.documents)
        for _ in range(options.rounds):
            for contestant in CONTESTANTS:
                record.add("building", **in_a_process(contestant, prefix, options.epochs))
    return 0


def torch_cpu() -> "torch.device":
    """The device that the record describes."""
    import torch

    return torch.device("cpu")


def in_a_process(contestant: str, prefix: Path, epochs: int) -> dict[str, Any]:
    """``measure`` in a process of its own, which imports no torch: its peak memory is the building's alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, contestant, prefix, epochs).result()


if __name__ == "__main__":
    sys.exit(main())
