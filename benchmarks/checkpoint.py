"""``python -m benchmarks.checkpoint``: how long training stands still for a save, written behind it or at once."""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from benchmarks.common import RESULTS, Record, Row, options_of
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.staging import BLOCK_BYTES, Staging
from megatron_aquila.checkpoint.store import Save
from megatron_aquila.parallel.context import ParallelContext

CPU = torch.device("cpu")
TENSORS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Saves of one rank's tensors to a temporary folder, in turns with plain copies of them."""

    out: Path | None = None
    """File of the results; default benchmarks/results/checkpoint.json."""
    megabytes: int = 1000
    """Size of the state, in 10^6 bytes."""
    rounds: int = 5
    """Saves of each kind after the first, which is told of by itself."""
    folder: Path | None = None
    """Where the temporary folder is made."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A megabyte: figures that mean nothing, which are not written unless --out says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "checkpoint", argv)
    megabytes = 1 if options.tiny else options.megabytes
    out = options.out if options.out is not None or options.tiny else RESULTS / "checkpoint.json"
    record = Record("checkpoint", settings=options, device=CPU, out=out)
    state = [torch.randn(megabytes * 10**6 // (4 * TENSORS)) for _ in range(TENSORS)]
    ctx, size = ParallelContext.single(CPU), sum(tensor.nbytes for tensor in state)
    target = [torch.zeros_like(tensor) for tensor in state]
    short = max(size // 8, BLOCK_BYTES)
    ways: dict[str, Staging | None] = {
        "at once (--no-async-save)": None,
        "behind training, memory for all of it": Staging(CPU, limit_bytes=size + 2 * BLOCK_BYTES),
        "behind training, memory for an eighth": Staging(CPU, limit_bytes=short),
    }
    shares = Shares.agree(chunks_of(state), ctx.host_world)
    for staging in ways.values():
        if staging is not None:  # as a run does when it starts
            staging.prepare(shares.num_bytes)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    copies: list[float] = []
    with tempfile.TemporaryDirectory(prefix="aquila_checkpoint_", dir=options.folder) as folder:
        for turn in range(options.rounds + 1):
            copies.append(copied(state, target))
            for name, staging in ways.items():
                figures[name].append(saved(Path(folder) / str(turn), state, ctx, staging, shares))
    for name in ways:
        record.add("saving", **row(name, size, figures[name], copies[1:]))
    return 0


def copied(state: list[Tensor], target: list[Tensor]) -> float:
    """Seconds of a plain copy into memory that was touched before."""
    began = time.perf_counter()
    for to, tensor in zip(target, state, strict=True):
        to.copy_(tensor)
    return time.perf_counter() - began


def chunks_of(state: list[Tensor]) -> list[Chunk]:
    """The tensors under names."""
    return [Chunk(f"t{number}", tuple(tensor.shape), (0,), tensor) for number, tensor in enumerate(state)]


def saved(
    root: Path, state: list[Tensor], ctx: ParallelContext, staging: Staging | None, shares: Shares
) -> tuple[float, float]:
    """Seconds until training may go on, and until the checkpoint is published."""
    began = time.perf_counter()
    save = Save(root, 1, chunks_of(state), {}, ctx.host_world, staging, shares)
    stall = time.perf_counter() - began
    save.finish()
    total = time.perf_counter() - began
    shutil.rmtree(root)
    return stall, total


def row(name: str, size: int, figures: list[tuple[float, float]], copies: list[float]) -> Row:
    """The first save of one way of saving, and medians of the others."""
    (first, *stalls), (_, *totals) = zip(*figures, strict=True)
    stall, copy = statistics.median(stalls), statistics.median(copies)
    return {
        "name": name,
        "num_bytes": size,
        "first_stall": first,
        "stall_seconds": stall,
        "longest_stall": max(stalls),
        "seconds": statistics.median(totals),
        "copy_seconds": copy,
        "stall_in_copies": stall / copy,
        "calls": len(stalls),
    }


if __name__ == "__main__":
    sys.exit(main())
