"""One function over many items in several processes: results in order, bounded memory, and no hang when one dies."""

import gc
import multiprocessing
import os
import queue
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Final, Generic, TypeVar, cast

from megatron_aquila.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Tell = Callable[[Any], None]
AHEAD: Final = 2  # items under way per worker
QUIET: Final = "TOKENIZERS_PARALLELISM"  # one core a worker: the tokenizers library would take them all
_DONE, _FAILED, _TOLD = range(3)


def ordered_map(
    function: Callable[[Item, Tell], Result], items: Iterable[Item], *, workers: int, tell: Tell
) -> Generator[Result, None, None]:
    """``function`` of each item and ``tell``; with more than one worker, each is a process that gets it once.

    ``tell`` brings what the function has to say while it works; it is called in any thread, at once or not in order.
    An error ends the whole as soon as it is known, although earlier items may be under way.

    Raises:
        DataError: a worker died, with its exit status.
        Exception: whatever ``function`` raised.
    """
    if workers == 1:
        for item in items:
            yield function(item, tell)
        return
    crew: list[_Worker[Item, Result]] = []
    idle: queue.SimpleQueue[_Worker[Item, Result]] = queue.SimpleQueue()
    with _single_threaded_tokenizers():
        for _ in range(workers):
            crew.append(_Worker(function, crew))
            idle.put(crew[-1])

    def call(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker.call(item, tell)
        finally:
            idle.put(worker)

    pending: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(threads.submit(call, item))
            while len(pending) >= AHEAD * workers or _is_told(pending):
                yield _oldest(pending)
        while pending:
            yield _oldest(pending)
    finally:
        for worker in crew:
            worker.stop()
        threads.shutdown(wait=True, cancel_futures=True)


@contextmanager
def kept_for_good() -> Iterator[None]:
    """What is made within stays as long as the process: no garbage is looked for meanwhile, nor in it later.

    Among the many objects of a vocabulary that takes a third of the time it takes to make them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def beside(function: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """``function`` at work in a process of its own, which ends with the block; what is given waits for its result.

    Where that fails, and where processes are not forked, it is called here instead.
    """
    if sys.platform != "linux":
        yield function
        return
    context = multiprocessing.get_context("fork")
    pipe, remote = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, remote), daemon=True)
    process.start()
    remote.close()

    def result() -> Result:
        try:
            return cast(Result, pipe.recv())
        except EOFError:
            return function()

    try:
        yield result
    finally:
        process.kill()
        process.join()
        pipe.close()


def _send(function: Callable[[], object], pipe: "Connection[Any, Any]") -> None:
    with suppress(Exception):  # which the parent will meet in its turn
        pipe.send(function())


def _is_told(pending: deque[Future[Result]]) -> bool:
    """Whether the first is done or another has failed, which does not wait for items that may be long in coming."""
    return len(pending) > 0 and (pending[0].done() or any(map(_has_failed, pending)))


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and future.exception() is not None


def _oldest(pending: deque[Future[Result]]) -> Result:
    """The result of the first, or the error of whichever fails before it is there."""
    while not pending[0].done():
        for future in filter(_has_failed, pending):
            future.result()
        wait([future for future in pending if not future.done()], return_when=FIRST_COMPLETED)
    return pending.popleft().result()


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """What is forked here inherits the switch; this process keeps what it had."""
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "false"
    try:
        yield
    finally:
        del os.environ[QUIET]
        if before is not None:
            os.environ[QUIET] = before


class _Worker(Generic[Item, Result]):
    """A process and the pipe to it. Forked where that is sound: a tokenizer is then there at once and held once."""

    def __init__(self, function: Callable[[Item, Tell], Result], older: Sequence["_Worker[Item, Result]"]) -> None:
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipe, remote = context.Pipe()
        # A forked one holds our ends of the older ones' pipes, and would keep these open when this process is killed.
        inherited = [worker._pipe for worker in (*older, self)] if sys.platform == "linux" else []
        self._process = context.Process(target=_serve, args=(function, remote, inherited), daemon=True)
        self._process.start()
        remote.close()

    def call(self, item: Item, tell: Tell) -> Result:
        with self._death_told():
            self._pipe.send(item)
            kind, value = self._pipe.recv()
        while kind == _TOLD:
            tell(value)  # whose own error, as of a closed terminal, is no death
            with self._death_told():
                kind, value = self._pipe.recv()
        if kind == _FAILED:
            raise value
        return cast(Result, value)

    @contextmanager
    def _death_told(self) -> Iterator[None]:
        """A pipe without its other end is a DataError with the worker's exit status."""
        try:
            yield
        except (EOFError, OSError) as broken:
            self._process.join()
            raise DataError(
                f"worker {self._process.pid} died, {_status(self._process.exitcode)}; if memory ran out, "
                "take fewer --workers; what was finished is kept"
            ) from broken

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(function: Callable[[Any, Tell], object], pipe: "Connection[Any, Any]", inherited: Sequence[Any]) -> None:
    """Answer calls until the other end is gone. Control-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[QUIET] = "false"
    for connection in inherited:
        connection.close()
    gc.freeze()  # to look for garbage in what the parent made would copy its pages,
    gc.disable()  # and among a million texts there is none: once an item is enough
    with suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            gc.collect()
            try:
                answer = (_DONE, function(item, lambda told: pipe.send((_TOLD, told))))
            except BrokenPipeError:
                raise
            except Exception as error:
                answer = (_FAILED, error)
            pipe.send(answer)


def _status(exitcode: int | None) -> str:
    assert exitcode is not None, "the process has not ended"
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit status {exitcode}"
