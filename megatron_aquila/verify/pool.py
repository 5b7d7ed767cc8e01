"""Gloo workers that stay up: a proof that needs 4 processes costs milliseconds, not the seconds of starting them."""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world  # torch lists its groups nowhere else

PRELOAD = ["torch", "torch.distributed", "megatron_aquila.verify.pool"]
GROUP_TIMEOUT = timedelta(seconds=30)
GRACE_SECONDS = 3.0  # after a first failure, how long the other ranks have to say why they failed
# What gloo says on a rank whose peer is gone or stuck: a consequence of the failure, never its cause.
CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "[timeout]",
)


class WorkerError(RuntimeError):
    """A function failed on some rank of a pool. The message shows the root cause first, the consequences last."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why one rank gave no result: ``text`` in full, ``summary`` in a line."""

    rank: int
    text: str
    summary: str

    @property
    def is_consequence(self) -> bool:
        return any(words in self.summary for words in CONSEQUENCES)


def _work(rank: int, world: int, connection: Connection, store_path: str) -> None:
    """Body of a worker: answer calls until the parent hangs up. Never returns, so that no inherited hook runs."""
    torch.set_num_threads(1)  # several processes with several threads each thrash: 30 times slower on two cores
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{store_path}", rank=rank, world_size=world, timeout=GROUP_TIMEOUT
    )
    gc.freeze()  # what was imported stays: collecting between calls is quick
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            fn, args = pickle.loads(request)
            answer = pickle.dumps((True, fn(*args)))
        except BaseException as error:
            summary = "".join(traceback.format_exception_only(error)).strip()
            connection.send_bytes(pickle.dumps((False, _Failure(rank, traceback.format_exc(), summary))))
            os._exit(1)  # closes the sockets, so that peers waiting for this rank fail at once
        connection.send_bytes(answer)
        _leave_groups()


def _leave_groups() -> None:
    """End the groups that the last call made. Each has a thread of gloo's that wakes up a hundred times a second.

    It ends when nothing refers to the group any more, a machine that is a cycle of references included.
    """
    dist.barrier()  # a rank that left early would close a connection that another still reads
    groups = [group for group in _world.pg_map if group is not dist.group.WORLD]
    for group in groups:
        dist.destroy_process_group(group)
    if groups:
        del groups, group
        gc.collect()


class WorkerPool:
    """``world`` processes with ``torch.distributed`` up on gloo, one thread each, kept from call to call.

    Started through a fork server that has imported torch already, so that a pool is up in a fraction of a second and
    inherits neither threads nor locks of this process. Values travel by pickle over pipes.
    """

    def __init__(self, world: int) -> None:
        assert world >= 1, f"a pool needs at least one worker, not {world}"
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="aquila_pool_")
        self._generation = 0
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._start()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Call ``fn(*args)`` in every worker and return the results by rank.

        ``fn`` is a function of a module. If any rank raises, dies or gives no answer within ``timeout`` seconds, all
        are killed, fresh workers are started and ``WorkerError`` tells why.
        """
        assert self._processes, "this pool is closed"
        request = pickle.dumps((fn, args))
        results: dict[int, Any] = {}
        failures: list[_Failure] = []
        try:
            for connection in self._connections:
                connection.send_bytes(request)
            results, failures = self._collect(timeout)
        finally:  # also on KeyboardInterrupt: a pool in the middle of a call cannot take another
            if len(results) < self.world:
                self._kill()
                self._start()
        if failures:
            raise WorkerError(_explain(getattr(fn, "__qualname__", repr(fn)), failures, self.world))
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the workers. Harmless when repeated."""
        self._kill()
        self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._generation += 1
        store_path = str(Path(self._folder.name) / f"store_{self._generation}")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world, theirs, store_path), daemon=True)
            process.start()
            theirs.close()  # the worker's copy is now the only one: its death is an EOF here
            self._connections.append(ours)
            self._processes.append(process)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._connections, self._processes = [], []

    def _collect(self, timeout: float) -> tuple[dict[int, Any], list[_Failure]]:
        """Results by rank, and failures in order of arrival, one for each rank without a result."""
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        results: dict[int, Any] = {}
        failures: list[_Failure] = []
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = "still running when another rank failed" if failures else f"no answer within {timeout:g} s"
                return results, [*failures, *(_Failure(rank, late, late) for rank in pending.values())]
            for connection in ready:
                assert isinstance(connection, Connection), f"waited for {connection}"
                rank = pending.pop(connection)
                succeeded, value = self._receive(rank, connection)
                if succeeded:
                    results[rank] = value
                else:
                    failures.append(value)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return results, failures

    def _receive(self, rank: int, connection: Connection) -> tuple[bool, Any]:
        try:
            succeeded, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            self._processes[rank].join(GRACE_SECONDS)
            died = f"the process died, exit code {self._processes[rank].exitcode}"
            return False, _Failure(rank, died, died)
        return succeeded, value


def _explain(name: str, failures: list[_Failure], world: int) -> str:
    """The first failure that is no consequence of another in full, then a line for each of the others."""
    first, *others = sorted(failures, key=lambda failure: failure.is_consequence)
    lines = [f"{name} failed on rank {first.rank} of {world}:", first.text.rstrip()]
    return "\n".join(lines + [f"rank {other.rank}: {other.summary}" for other in others])
