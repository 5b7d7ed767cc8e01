"""Who may ask a run to stop: a signal, the clock, a file. Imports no torch: signals are caught from the first."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_aquila.errors import Stopped


class StopRequest:
    """What asks this rank to stop: a signal, and what ``limit`` adds.

    Until ``begin`` a signal ends the process at once, as there is nothing to save. Then SIGTERM and SIGINT are kept
    until the ranks agree; a second SIGINT interrupts at once. ``check`` is called whenever it is asked, and may raise.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.check: Callable[[], None] = lambda: None
        self._is_starting = True
        self._started = time.monotonic()
        self._minutes: float | None = None
        self._file: Path | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._is_starting:
            raise Stopped(number)
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def limit(self, *, minutes: float | None, file: Path | None) -> None:
        """Stop also after so many minutes of this process, and once ``file`` is there."""
        self._minutes, self._file = minutes, file

    def begin(self) -> None:
        """Training begins: from now on a stop is agreed, and saves."""
        self._is_starting = False

    @property
    def is_asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        self.check()
        return self.signal_name is not None or self._is_late or self._has_file

    @property
    def reason(self) -> str:
        """Why, as far as this rank knows."""
        if self.signal_name is not None:
            return self.signal_name
        if self._is_late:
            return "--exit-minutes have passed"
        return f"{self._file} was found" if self._has_file else "another rank was asked to stop"

    def honour(self) -> None:
        """The run has stopped: a stop file has served, and is removed, or the next run would stop as well."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    @property
    def _is_late(self) -> bool:
        return self._minutes is not None and time.monotonic() - self._started > 60 * self._minutes

    @property
    def _has_file(self) -> bool:
        return self._file is not None and os.path.exists(self._file)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT for the body's length."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
