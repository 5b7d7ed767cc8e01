"""Checkpoints of a few numbers, and ways to damage them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import Json, _digest
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.staging import Staging
from megatron_aquila.checkpoint.store import Save
from megatron_aquila.parallel.context import ParallelContext

FILE = "rank_00000.safetensors"


def save_checkpoint(
    root: Path,
    step: int,
    chunks: Sequence[Chunk],
    state: Mapping[str, Json],
    ctx: ParallelContext,
    staging: Staging | None = None,
    shares: Shares | None = None,
) -> Path:
    """A ``Save``, begun and finished."""
    return Save(root, step, chunks, state, ctx.host_world, staging, shares).finish()


def numbers(value: float) -> list[Chunk]:
    """Two small tensors."""
    return [
        Chunk("weight", (6,), (0,), torch.full((6,), value)),
        Chunk("other", (2, 2), (0, 0), torch.ones(2, 2)),
    ]


def save_numbers(root: Path, step: int, value: float, staging: Staging | None = None) -> Path:
    """One rank's checkpoint; returns its folder."""
    state = {"value": value, "train": {"consumed_samples": 1000 * step}}
    return save_checkpoint(root, step, numbers(value), state, ParallelContext.single(), staging)


def flip(path: Path, at: int, change: Callable[[int], int] = lambda byte: byte ^ 1) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[at] = change(data[at])
    path.write_bytes(data)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the hash of what it then says, as someone would who means harm."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_text(json.dumps(body | {"sha256": _digest(body)}))
