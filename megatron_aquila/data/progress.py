"""How long work on data says how far it is."""

import time
from collections.abc import Callable
from typing import Final, TypeAlias

Report: TypeAlias = Callable[[str, int, int], None]  # what is being made, how much is done, of how much
QUIET_SECONDS: Final = 5.0


def ignore(what: str, done: int, total: int) -> None:
    """A ``Report`` that says nothing."""


def counting(report: Report, what: str, total: int) -> Callable[[int], None]:
    """Turns calls with what was done since the last one into a ``Report`` of ``what`` from 0 to ``total``."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        report(what, done, total)

    return count


def lines(write: Callable[[str], None], *, every_seconds: float = QUIET_SECONDS) -> Report:
    """A ``Report`` that writes a line every so often; work that is done sooner is not mentioned."""
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_seconds:
            last = now
            write(f"{what}: {done:,} of {total:,}, {done / max(total, 1):.0%}")

    return report
