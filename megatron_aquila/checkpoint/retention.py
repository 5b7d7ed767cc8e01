"""Which checkpoints stay."""

import os
import shutil
from pathlib import Path

from megatron_aquila.checkpoint.folders import LATEST, beside, complete_steps, step_folder


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the ``keep`` newest checkpoints in ``root``, and what killed saves left. Returns what went.

    The one that ``latest`` names always stays. For one process, while no save is running. Raises OSError.
    """
    assert keep >= 1, f"keep={keep}: at least the newest checkpoint stays"
    latest = root / LATEST
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    removed: list[Path] = []
    for step in complete_steps(root)[:-keep]:
        folder = step_folder(root, step)
        if folder.name != named:
            # Renamed first: a removal that is cut short must not leave half a checkpoint under a final name.
            os.rename(folder, beside(folder, "tmp"))
            removed.append(folder)
    for leftover in [*root.glob("step_*.tmp"), *root.glob("step_*.old")]:
        if leftover.suffix == ".tmp" or leftover.with_suffix("").exists():
            shutil.rmtree(leftover)
    return removed
