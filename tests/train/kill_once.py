"""``aquila pretrain`` that kills itself once, after a step: ``kill_once.py STEP MARKER WHO [FLAGS]``.

``WHO`` is ``rank`` for rank 1, ``node`` for the process and its launcher's agent, ``nobody``.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_aquila.commands import pretrain
from megatron_aquila.train import trainer


def main() -> int:
    """Run; a first life ends after ``STEP``, which ``MARKER`` remembers."""
    step, marker, who, flags = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    right = trainer.Steps.take

    def take(steps: trainer.Steps, state: Any, *, stop_requested: bool) -> Any:
        is_meant = who == "node" or (who == "rank" and os.environ["RANK"] == "1")
        if is_meant and state.step == step and not marker.exists():
            marker.touch()
            if who == "node":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return right(steps, state, stop_requested=stop_requested)

    trainer.Steps.take = take
    return pretrain.main(flags)


if __name__ == "__main__":
    sys.exit(main())
