"""Starting a run's processes: by torchrun, or forked from one that has imported torch already."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from tests.chaos import hooks

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
PRELOAD = ["tests.chaos.hooks"]


class Running(Protocol):
    """A run that was started."""

    def wait(self, *, seconds: float, grace: float) -> list[int]:
        """The statuses of its processes once all have ended; who outlives a failed one by ``grace`` is killed.

        Raises TimeoutError, and kills all, where they have not ended in time.
        """

    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""


class Forked:
    """Two whole processes of ``aquila pretrain`` that talk over gloo, without torchrun and without its seconds."""

    def __init__(self, plan: Path, flags: Sequence[str], out: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._processes: list[BaseProcess] = []
        for rank in range(WORLD):
            args = (rank, WORLD, port, str(plan), list(flags), str(out))
            self._processes.append(context.Process(target=hooks.forked, args=args, daemon=True))
        for process in self._processes:
            process.start()

    def wait(self, *, seconds: float, grace: float) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            while not self.is_over():
                if any(process.exitcode not in (None, 0) for process in self._processes):
                    deadline = min(deadline, time.monotonic() + grace)
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            is_late = not self.is_over() and all(process.exitcode in (None, 0) for process in self._processes)
        finally:
            for process in self._processes:
                process.kill()
                process.join()
        if is_late:
            raise TimeoutError(f"the run did not end within {seconds:.0f} s")
        return [int(process.exitcode or 0) for process in self._processes]

    def is_over(self) -> bool:
        return all(process.exitcode is not None for process in self._processes)


class Torchrun:
    """torchrun with two workers, which it starts again up to ``restarts`` times."""

    def __init__(self, plan: Path, flags: Sequence[str], out: Path, *, restarts: int = 0) -> None:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        words += ["--max-restarts", str(restarts), "-m", "tests.chaos.hooks", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), hooks.PLAN: str(plan)}
        environment["TMPDIR"] = str(out.parent)  # where it leaves its own
        with out.open("ab") as file:
            self._process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def wait(self, *, seconds: float, grace: float) -> list[int]:
        try:
            return [self._process.wait(timeout=seconds + grace)]
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"torchrun did not end within {seconds:.0f} s") from None
        finally:
            if self._process.poll() is None:
                self._process.terminate()  # it ends its workers; killed, it would leave them behind
                self._process.wait(timeout=60)

    def is_over(self) -> bool:
        return self._process.poll() is not None
