"""Wall time of named parts of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Adds up the seconds spent under each name until ``take`` empties it.

    ``clock`` is in seconds. On a device that computes asynchronously, time what waits for it: these are host seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent in the ``with`` block to ``name``, also when the block raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Seconds by name since the last ``take``."""
        seconds, self._seconds = self._seconds, {}
        return seconds
