"""What torchrun told this process. Imports no torch, so that wrong settings answer at once."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process among those of the run. ``run_id`` is the launcher's name for it, the same after restarts."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    run_id: str = ""


def read_launch() -> Launch:
    """From torchrun's variables; without a launcher the world is this process."""
    return Launch(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        run_id=os.environ.get("TORCHELASTIC_RUN_ID", ""),
    )
