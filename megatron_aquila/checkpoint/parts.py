"""A rank's part of a run as a checkpoint of its own, which only the same rank of the same layout can go on from.

What is a rectangle of a logical tensor elsewhere is a whole tensor here, ``name@offset``: the folder, its manifest and
its hashes are those of any checkpoint of one rank, and nobody writes for another. So each node can keep its ranks'
parts on a disk of its own. A run goes on from parts where every rank has its own of the same save, whole.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.checkpoint.folders import beside, complete_steps, step_folder
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import piece_key
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import Group

ALONE = Group("alone", 0, 1, (0,), None)
PART = "part"
"""What a part's state has that no other checkpoint's has: the name of the save that it belongs to."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Parts of ``step`` that are not gone on from, and why, for people."""

    step: int
    reason: str


def part_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same memory as whole tensors, those included that are copies of another rank's."""
    return [
        Chunk(
            piece_key(chunk.name, chunk.offset),
            tuple(chunk.tensor.shape),
            (0,) * len(chunk.offset),
            chunk.tensor,
        )
        for chunk in chunks
        if chunk.tensor.numel() > 0
    ]


def part_steps(folder: Path) -> list[int]:
    """The steps of which a rank's ``folder`` holds its part; none where it cannot be read."""
    try:
        return complete_steps(folder)
    except OSError:
        return []


def agree_on_parts(
    folder: Path, shares: Shares, world: Group, problem: Callable[[CheckpointReader], str | None]
) -> tuple[Path | None, list[Refusal]]:
    """The newest step of which every rank has its part, whole, in its own ``folder``; and what was not taken.

    Collective over ``world``. Each rank reads and hashes what it has; ``shares`` are those of its part now, ``problem``
    says what else speaks against one. Where a part is missing, damaged or of another layout on any rank its step is
    refused on all.
    """
    tables = together(lambda: _offers(folder, shares, problem), world)
    steps: dict[tuple[int, str], dict[int, str | None]] = {}
    for rank, offers in zip(world.ranks, tables, strict=True):
        for step, save, why in offers:
            steps.setdefault((step, save), {})[rank] = why
    refused: list[Refusal] = []
    for (step, _), offered in sorted(steps.items(), reverse=True):
        reasons: dict[str, list[int]] = {}
        for rank in world.ranks:
            why = offered.get(rank, "it has no part of it")
            if why is not None:
                reasons.setdefault(why, []).append(rank)
        if not reasons:
            return step_folder(folder, step), refused
        lines = (f"{why} (rank {', '.join(map(str, ranks))})" for why, ranks in reasons.items())
        refused.append(Refusal(step, "; ".join(lines)))
    return None, refused


def remove_parts(folder: Path, *, but: int | None = None) -> None:
    """Remove a rank's parts and what killed saves left, except those of step ``but``. Raises OSError."""
    if not folder.is_dir():
        return
    for path in [*folder.glob("step_*.tmp"), *folder.glob("step_*.old")]:
        if path.suffix == ".tmp" or path.with_suffix("").exists():
            shutil.rmtree(path)
    for step in complete_steps(folder):
        if step != but:
            # renamed first: a removal that is cut short must not leave half a part under a final name
            path = step_folder(folder, step)
            path.rename(beside(path, "tmp"))
            shutil.rmtree(beside(path, "tmp"))


def _offers(
    folder: Path, shares: Shares, problem: Callable[[CheckpointReader], str | None]
) -> list[tuple[int, str, str | None]]:
    """Step and save of each part in the folder, and what is wrong with it."""
    offers: list[tuple[int, str, str | None]] = []
    for step in part_steps(folder):
        save: Any = ""
        try:
            reader = CheckpointReader(step_folder(folder, step))
            save = str(reader.state.get(PART))
            why = problem(reader) or _other_layout(reader, shares)
            if why is None:
                reader.verify_here()
        except CheckpointError as error:
            why = str(error)
        offers.append((step, save, why))
    return offers


def _other_layout(reader: CheckpointReader, shares: Shares) -> str | None:
    found, wanted = (
        {name: (stored.shape, stored.dtype) for name, stored in tensors.items()}
        for tensors in (reader.tensors, shares.tensors)
    )
    if found == wanted:
        return None
    return f"{reader.folder}: it was written by another layout, in which this rank held other parts of the tensors"
