"""Names of checkpoint folders, and the few ways in which a folder or a file gets its final name."""

import os
import re
import shutil
from pathlib import Path

from megatron_aquila.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP = re.compile(r"step_(\d{7,})")


def step_folder(root: Path, step: int) -> Path:
    """``root/step_0000100``."""
    return root / f"step_{step:07d}"


def beside(folder: Path, ending: str) -> Path:
    """The folder's name with ``.tmp`` (being written) or ``.old`` (being replaced) added."""
    return folder.with_name(f"{folder.name}.{ending}")


def complete_steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints in ``root``, ascending; unfinished ones have another name."""
    names = (_STEP.fullmatch(path.name) for path in root.iterdir() if (path / MANIFEST).is_file())
    return sorted(int(match[1]) for match in names if match is not None)


def step_of(folder: Path) -> int | None:
    """100 of ``step_0000100``, also while it is being replaced; ``None`` where the name is no step's."""
    match = _STEP.fullmatch(folder.name.removesuffix(".old"))
    return None if match is None else int(match[1])


def holds_run(root: Path) -> bool:
    """Whether a run has saved into ``root``; that may have lost its ``latest``."""
    return (root / LATEST).exists() or (root.is_dir() and bool(complete_steps(root)))


def find_checkpoint(path: Path) -> Path:
    """The step folder that ``path`` means: itself, or the one its ``latest`` names. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; name a checkpoint or the folder that holds them")
    if path.suffix == ".tmp":
        raise CheckpointError(f"{path}: a save that never finished; use another step of {path.parent}")
    if (path / MANIFEST).is_file():
        return path
    latest = path / LATEST
    if not latest.is_file():
        steps = ", ".join(step_folder(path, step).name for step in complete_steps(path))
        way_out = f"name one of its checkpoints: {steps}" if steps else "no save has finished here"
        raise CheckpointError(f"{path}: it holds no file `{LATEST}` and no {MANIFEST}; {way_out}")
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if _STEP.fullmatch(name) is None:
        raise CheckpointError(f"{latest}: {name[:80]!r} is not the name of a step; write e.g. step_0000100 into it")
    # Replacing a step takes two renames; whoever looks between them finds the old one beside.
    for folder in (path / name, beside(path / name, "old")):
        if (folder / MANIFEST).is_file():
            return folder
    raise CheckpointError(f"{latest}: it names {name}, which is not there or has no {MANIFEST}; name another step")


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, flush it, and give it its name. Raises OSError."""
    temporary = beside(path, "tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished folder; one that has the name already is replaced, and at every instant one is whole."""
    old = beside(final, "old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)
