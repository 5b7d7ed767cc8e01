"""Which checkpoints stay."""

import os
import shutil
from pathlib import Path

from megatron_aquila.checkpoint.folders import LATEST, beside, complete_steps, step_folder


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but ``keep`` checkpoints in ``root``, and what killed saves left. Returns what went.

    The one that ``latest`` names stays, then the newest before it. Steps above it are of a run that was abandoned when
    training went back, and go first. For one process, while no save is running. Raises OSError.
    """
    assert keep >= 1, f"keep={keep}: at least the newest checkpoint stays"
    for leftover in [*root.glob("step_*.tmp"), *root.glob("step_*.old")]:
        if leftover.suffix == ".tmp" or leftover.with_suffix("").exists():
            shutil.rmtree(leftover)
    latest = root / LATEST
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    steps = complete_steps(root)
    newest = next((step for step in steps if step_folder(root, step).name == named), max(steps, default=0))
    removed = [step_folder(root, step) for step in sorted(steps, key=lambda step: (step <= newest, step))[:-keep]]
    for folder in removed:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under a final name.
        os.rename(folder, beside(folder, "tmp"))
        shutil.rmtree(beside(folder, "tmp"))
    return removed
