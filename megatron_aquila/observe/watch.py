"""A rank that makes no progress writes down what its threads are doing, by itself and when it is asked to."""

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_aquila.observe.breadcrumbs import FOLDER, Recorder, stack_name

DUMP_SIGNAL = signal.SIGUSR1  # answered outside the interpreter, so also by a rank that hangs in C++
SECTION = "---"  # before each dump that a rank makes by itself


@contextmanager
def watched(
    recorder: Recorder, run: Path, *, seconds: float, tell: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Dump this process's Python stacks into ``RUN/breadcrumbs/rank_N.stack`` where it hangs, for the body's length.

    Once each time that the recorder was told nothing for ``seconds``, and on ``SIGUSR1``, for which ``aquila doctor
    hang`` asks on its own machine. Of several ranks 0 and 1 also ``tell`` of it (default: stderr), so that one of them
    does where the other is stuck. Takes the signal only in the main thread.
    """
    rank, talks = recorder.rank, recorder.rank < 2 <= recorder.world
    tell = _to_stderr if tell is None else tell
    with (run / FOLDER / stack_name(rank)).open("w", encoding="utf-8") as file:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True, chain=False)
        ended = threading.Event()
        line = (
            f"rank {rank}: no transfer and no step begun for {{:.0f}} s; `aquila doctor hang {run}` tells who is behind"
        )
        arguments = (recorder, file, seconds, ended, (lambda idle: tell(line.format(idle))) if talks else _nothing)
        thread = threading.Thread(target=_watch, args=arguments, name="hang watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if in_main:
                faulthandler.unregister(DUMP_SIGNAL)


def last_stack(text: str) -> str:
    """The main thread's part of the newest dump: it began first and is listed last. Empty where there is none."""
    newest = text.rpartition(f"{SECTION} ")[2]
    blocks = [block for block in newest.split("\n\n") if "(most recent call first)" in block]
    return blocks[-1].strip() if blocks else ""


def _watch(
    recorder: Recorder, file: TextIO, seconds: float, ended: threading.Event, tell: Callable[[float], None]
) -> None:
    dumped_for = 0.0  # the moment since which nothing happened, at the last dump
    while not ended.wait(min(seconds / 4, 5.0)):
        last, now = recorder.last, time.time()
        if now - last < seconds or last == dumped_for:
            continue
        dumped_for = last
        file.write(f"{SECTION} {time.strftime('%Y-%m-%d %H:%M:%S')}, {now - last:.0f} s without a transfer\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.write("\n")
        file.flush()
        tell(now - last)


def _nothing(_idle: float) -> None:
    pass


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
