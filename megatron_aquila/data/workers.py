"""One function over many items in several processes: results in order, bounded memory, and no hang when one dies."""

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final, Generic, TypeVar, cast

from megatron_aquila.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD: Final = 2  # items under way per worker


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """``map(function, items)``; with more than one worker, each is a process that is sent ``function`` once.

    Raises:
        DataError: a worker died, with its exit status.
        Exception: whatever ``function`` raised.
    """
    if workers == 1:
        yield from map(function, items)
        return
    crew = [_Worker(function) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker[Item, Result]] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def call(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker.call(item)
        finally:
            idle.put(worker)

    pending: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for item in items:
            if len(pending) >= AHEAD * workers:
                yield pending.popleft().result()
            pending.append(threads.submit(call, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for worker in crew:
            worker.stop()
        threads.shutdown(wait=True, cancel_futures=True)


class _Worker(Generic[Item, Result]):
    """A process and the pipe to it."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        # spawn: nothing is inherited, so a worker sees the end of its pipe when this process is killed.
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, remote), daemon=True)
        self._process.start()
        remote.close()

    def call(self, item: Item) -> Result:
        try:
            self._pipe.send(item)
            result, error = self._pipe.recv()
        except (EOFError, OSError) as broken:
            self._process.join()
            raise DataError(
                f"worker {self._process.pid} died, {_status(self._process.exitcode)}; if memory ran out, "
                "take fewer --workers; nothing was published"
            ) from broken
        if error is not None:
            raise error
        return cast(Result, result)

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(function: Callable[[Any], object], pipe: "Connection[Any, Any]") -> None:
    """Answer calls until the other end is gone. Control-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker: the tokenizers library would take them all
    with suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            try:
                result, failure = function(item), None
            except Exception as error:
                result, failure = None, error
            pipe.send((result, failure))


def _status(exitcode: int | None) -> str:
    assert exitcode is not None, "the process has not ended"
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit status {exitcode}"
