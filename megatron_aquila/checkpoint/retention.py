"""Which checkpoints stay, and the names that keep one for ever."""

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megatron_aquila.checkpoint.folders import LATEST, beside, complete_steps, find_checkpoint, step_folder, write_text
from megatron_aquila.errors import CheckpointError

TAGS = "tags"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def prune(root: Path, keep: int, *, every: int | None = None, leftovers: bool = True) -> list[Path]:
    """Remove the checkpoints that ``superfluous`` names. Returns their folders. Raises OSError.

    ``leftovers``: also what killed saves left, which only the one process may do whose run saves there, while no save
    is under way.
    """
    if leftovers:
        for leftover in [*root.glob("step_*.tmp"), *root.glob("step_*.old")]:
            if leftover.suffix == ".tmp" or leftover.with_suffix("").exists():
                shutil.rmtree(leftover)
    removed = superfluous(root, keep, every=every)
    for folder in removed:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under a final name.
        os.rename(folder, beside(folder, "tmp"))
        shutil.rmtree(beside(folder, "tmp"))
    return removed


def superfluous(root: Path, keep: int, *, every: int | None = None) -> list[Path]:
    """The folders of the checkpoints in ``root`` that need not stay.

    The one that ``latest`` names stays, and the newest before it, ``keep`` in all; each whose step is a multiple of
    ``every``; and each that has a tag. Steps above ``latest`` are of a run that was abandoned when training went back,
    and count as older than all.
    """
    assert keep >= 1, f"keep={keep}: at least the newest checkpoint stays"
    steps, latest = complete_steps(root), root / LATEST
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
    newest = next((step for step in steps if step_folder(root, step).name == named), max(steps, default=0))
    by_age = sorted(steps, key=lambda step: (step <= newest, step))
    return [step_folder(root, step) for step in unprotected(by_age[:-keep], every, tags(root))]


def unprotected(steps: Sequence[int], every: int | None, tagged: Mapping[str, str]) -> list[int]:
    """Those of ``steps`` that neither ``every`` nor a tag keeps."""
    names: Collection[str] = tagged.values()
    return [
        step for step in steps if (every is None or step % every != 0) and step_folder(Path(), step).name not in names
    ]


def tags(root: Path) -> dict[str, str]:
    """The names of steps by tag, e.g. ``{"before-anneal": "step_0001000"}``."""
    folder = root / TAGS
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.iterdir() if _TAG.fullmatch(path.name) and path.suffix != ".tmp")
    return {path.name: path.read_text(encoding="utf-8", errors="replace").strip() for path in files}


def add_tag(path: Path, name: str) -> Path:
    """Give the checkpoint that ``path`` means the tag ``name``; returns its folder.

    Raises CheckpointError where the name will not do or another checkpoint has it.
    """
    if _TAG.fullmatch(name) is None or name.endswith(".tmp"):
        raise CheckpointError(f"{name!r} is no tag: use letters, digits, '.', '_' and '-'")
    folder = find_checkpoint(path)
    root = folder.resolve().parent
    taken = tags(root).get(name)
    if taken not in (None, folder.name):
        raise CheckpointError(f"{root / TAGS / name}: {taken} has this tag; remove that file first, or choose another")
    (root / TAGS).mkdir(exist_ok=True)
    write_text(root / TAGS / name, folder.name + "\n")
    return folder


def remove_tag(root: Path, name: str) -> None:
    """Take a tag away, where it is there. Raises OSError."""
    (root / TAGS / name).unlink(missing_ok=True)
