"""``python -m benchmarks.convert``: memory and time of converting a checkpoint of the 34B's sizes with few layers."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from benchmarks.common import RESULTS, ROOT, Record, Row, options_of
from megatron_aquila.checkpoint.huggingface import write_json
from megatron_aquila.checkpoint.llama import SpecialIds, llama_config, llama_tensors
from megatron_aquila.checkpoint.tensorfile import Entry, write_tensors
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.plan.shape import ModelShape

Stop = Callable[[Path], bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Published weights, random ones in bf16, into a checkpoint, back, and into Megatron's files; one at a time."""

    out: Path | None = None
    """File of the results; default benchmarks/results/convert.json."""
    layers: int = 2
    """Of the 60; a multiple of 2."""
    shard_size: str = "1GB"
    """Of the written files."""
    folder: Path | None = None
    """Where the temporary folder is made; four times the weights must fit."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A narrow model: figures that mean nothing, which are not written unless --out says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "convert", argv)
    out = options.out if options.out is not None or options.tiny else RESULTS / "convert.json"
    record = Record("convert", settings=options, device=torch.device("cpu"), out=out)
    with tempfile.TemporaryDirectory(prefix="aquila_convert_", dir=options.folder) as name:
        folder = Path(name)
        source, ours, again = folder / "published", folder / "ours", folder / "again"
        size = publish(source, shape_of(options))
        began = time.perf_counter()
        shutil.copytree(source, folder / "copy")
        copy = time.perf_counter() - began
        shutil.rmtree(folder / "copy")
        shards = ("--shard-size", options.shard_size)
        add = partial(_add, record, size, copy)
        add("published to a checkpoint, logits compared", measured(source, ours, *shards))
        add("back, logits compared", measured(ours, again, "--no-tokenizer", *shards))
        shutil.rmtree(again)
        cut = ("--to-format", "megatron", "--tp", "4", "--pp", "2")
        add("published to Megatron's files, tp 4 pp 2", measured(source, folder / "megatron", *cut))
        add("out of them", measured(folder / "megatron", again))
        shutil.rmtree(again)
        add("to a checkpoint, killed at the second file", measured(source, again, *shards, stop=has_one_file))
        add("the same, taken up", measured(source, again, *shards))
    return 0


def shape_of(options: Options) -> ModelShape:
    """The 34B with few layers; a narrow one to try the code out."""
    narrow = ["--hidden-size", "64", "--num-attention-heads", "8", "--num-query-groups", "4", "--ffn-hidden-size", "96"]
    flags = ["--preset", "aquila2-34b", "--num-layers", str(options.layers), "--pp", "1"]
    config = load_config([*flags, *(narrow if options.tiny else [])], prog="convert").config
    return derive(config, 4).shape


def publish(folder: Path, shape: ModelShape) -> int:
    """Random weights as a publisher leaves them, a file a tensor's name begins with; returns their bytes."""
    folder.mkdir()
    entries = [Entry(name, torch.bfloat16, size, partial(drawn, size)) for name, size in llama_tensors(shape).items()]
    files = {"embedding": entries[:1], "layers": entries[1:-1], "head": entries[-1:]}
    weight_map: dict[str, str] = {}
    for name, part in files.items():
        write_tensors(folder / f"{name}.safetensors", part, {"format": "pt"})
        weight_map |= {entry.key: f"{name}.safetensors" for entry in part}
    total = sum(entry.num_bytes for entry in entries)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", llama_config(shape, torch.bfloat16, SpecialIds(bos=None, eos=1, pad=None)))
    return total


def drawn(size: tuple[int, ...]) -> Tensor:
    """Small normal numbers; ones where a norm is."""
    return torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else torch.empty(size).normal_(0, 0.02).bfloat16()


def has_one_file(output: Path) -> bool:
    """Whether one of the files is done."""
    progress = output.with_name(f"{output.name}.tmp") / "progress.json"
    return progress.is_file() and "safetensors" in progress.read_text(encoding="utf-8").partition('"done"')[2]


def measured(source: Path, output: Path, *flags: str, stop: Stop = lambda _: False) -> Row:
    """Seconds and own memory of ``aquila convert``, started anew; killed as soon as ``stop`` says so."""
    command = [sys.executable, "-m", "megatron_aquila", "convert", "--from", str(source), "--to", str(output), *flags]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, own_bytes(process.pid))
        if stop(output):
            process.kill()
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    told = process.stderr.read() if process.stderr is not None else ""
    assert process.returncode in (0, -signal.SIGKILL), told
    return {"seconds": seconds, "own_bytes": peak}


def own_bytes(pid: int) -> int:
    """Memory that is not a file's pages; 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _add(record: Record, size: int, copy: float, name: str, found: Row) -> None:
    record.add("converting", name=name, num_bytes=size, **found, in_copies=found["seconds"] / copy)


if __name__ == "__main__":
    sys.exit(main())
