"""``aquila pretrain`` whose rank 1 kills itself once, after a step: ``kill_once.py STEP MARKER [FLAGS]``."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_aquila.commands import pretrain
from megatron_aquila.train import trainer


def main() -> int:
    """Run; the first life of rank 1 ends after ``STEP``, which ``MARKER`` remembers."""
    step, marker, flags = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    right = trainer.Steps.take

    def take(steps: trainer.Steps, state: Any, *, stop_requested: bool) -> Any:
        if os.environ.get("RANK") == "1" and state.step == step and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return right(steps, state, stop_requested=stop_requested)

    trainer.Steps.take = take
    return pretrain.main(flags)


if __name__ == "__main__":
    sys.exit(main())
