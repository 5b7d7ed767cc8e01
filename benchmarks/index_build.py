"""Time and memory of building the index of a large data set: ours, and numpy's way as Megatron-LM goes it.

``python -m benchmarks.index_build [--documents 10000000] [--epochs 4] [--output FILE]`` makes lengths of documents,
then builds the index in a process for each contestant, one after the other, and prints JSON. The peer's order of
documents (``mgrid``, ``RandomState.shuffle``), its shuffle of samples and its arrays, all in memory, are repeated here
in numpy; the sample index is ours in both, for the peer's is C++ as well.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.native import INDEX_BUILDER, build_sample_index
from megatron_aquila.data.samples import PackedSamples, Packing

SEQ_LEN, SEED, MEAN_TOKENS = 2048, 1234, 1011


def write_lengths(prefix: Path, documents: int) -> None:
    """A data set of ``documents`` with lognormal lengths, its tokens a hole in the file."""
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, documents).astype(np.int64) + 1
    with IndexedDatasetWriter(prefix, np.uint8) as writer:
        writer._lengths.frombytes(lengths.astype(np.int32).tobytes())
        writer._boundaries.frombytes(np.arange(1, documents + 1, dtype=np.int64).tobytes())
    Path(f"{prefix}.manifest.json").unlink()
    os.truncate(f"{prefix}.bin", int(lengths.sum()))


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
    sample_index = build_sample_index(np.array(dataset.sequence_lengths), documents, SEQ_LEN, samples, wide=False)
    order = np.arange(samples, dtype=np.uint32)
    random.shuffle(order)
    for name, values in (("documents", documents), ("samples", sample_index), ("order", order)):
        np.save(prefix.parent / f"{name}.npy", values)
    return len(order)


def wanted(dataset: IndexedDataset, epochs: int) -> int:
    """All whole samples of so many epochs, so that the last is not shuffled on its own."""
    return (epochs * int(dataset.sequence_lengths.sum(dtype=np.int64)) - 1) // SEQ_LEN


CONTESTANTS: dict[str, Callable[[Path, int], int]] = {"aquila": build_ours, "numpy": build_numpy}


def measure(contestant: str, prefix: Path, epochs: int) -> dict[str, object]:
    """In this process: seconds, CPU seconds, and its peak memory."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    samples = CONTESTANTS[contestant](prefix, epochs)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "contestant": contestant,
        "samples": samples,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mib": peak // 1024,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and print, or as ``--only`` one contestant in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=CONTESTANTS)
    parser.add_argument("--prefix", type=Path)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.only, options.prefix, options.epochs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        write_lengths(prefix, options.documents)
        settings = ["--epochs", str(options.epochs), "--prefix", str(prefix)]
        rows = [
            json.loads(subprocess.check_output([sys.executable, "-m", __spec__.name, "--only", name, *settings]))
            for _ in range(options.repeats)
            for name in CONTESTANTS
        ]
    machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    head = {"documents": options.documents, "epochs": options.epochs, "seq_len": SEQ_LEN, "builder": INDEX_BUILDER}
    text = json.dumps({**head, "numpy": np.__version__, "machine": machine, "rows": rows}, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
