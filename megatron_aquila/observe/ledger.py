"""A run's ledger: what happened to it, an event a line, from its first start to its last checkpoint.

One JSON object a line. Every event has ``event`` and ``time`` (UTC, ISO 8601); ranges of samples are half-open pairs.

``start``       ``run``, ``origin`` (``fresh``, ``auto``, ``load``), ``checkpoint`` (its name, path, step and samples)
                or null; of an ephemeral one also its ``parent`` and the ``ranges`` since that), ``samples``,
                ``version``, ``commit``, ``world``, ``layout``, ``config``, ``data``, ``skipped``
``checkpoint``  ``name``, ``parent``, ``step``, ``samples``; ``ranges``: what steps took since the parent; ``skipped``:
                what was not trained on, of the whole run; ``next_samples`` and their ``digest``
``ephemeral``   ``step``, ``samples``, ``parent`` (a durable one), ``outcome`` (``saved``, ``failed``) and ``reason``
``skip``        ``step``, ``samples`` (a range) and ``reason`` of a step that was not applied
``rewind``      ``step``, ``samples`` where it was given up; the ``checkpoint`` gone back to; ``skipped``, ``reason``
``fallback``    ``bad``, ``checkpoint``, ``reason``: a damaged checkpoint was passed over for an older one
``export``      ``checkpoint``, ``outcome`` (``done``, ``failed``, ``stopped``), ``seconds`` of a release
``stop``        ``step``, ``samples``, ``reason``, ``failed``, ``ranges`` since the last checkpoint
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_aquila.errors import DataError

LEDGER_NAME = "ledger.jsonl"

Event = Mapping[str, Any]
Ranges = tuple[tuple[int, int], ...]


class Ledger:
    """Appends events to ``path``, each flushed to the disk before ``write`` returns.

    A line that was torn, by a kill or a full disk, is cut off before the next one is written. A disk that takes
    nothing is said to ``complain`` and does not stop the run. Raises ``OSError`` where the file cannot be opened.
    """

    def __init__(self, path: Path, *, complain: Callable[[str], None] = lambda text: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._complain = path, complain
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self._whole = self._file.read().rfind(b"\n") + 1

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. ``fields`` are JSON values."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": time, **fields}, ensure_ascii=False).encode() + b"\n"
        try:
            self._file.truncate(self._whole)
            written = self._file.write(line)
            os.fsync(self._file.fileno())
        except OSError as error:
            self._complain(f"{self.path}: {event} was not written: {error}")
            return
        if written == len(line):
            self._whole += written
        else:
            self._complain(f"{self.path}: {event} was not written: the disk took {written} of {len(line)} bytes")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(path: Path) -> list[Event]:
    """All events, in order; a torn last line is none.

    ``path`` is the file or its folder. Raises ``DataError`` where there is no ledger or another line is no event.
    """
    file = path / LEDGER_NAME if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; name a run's --save folder, or its --log-dir without one"
        ) from error
    events: list[Event] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            event = json.loads(line)
            _ = event["event"], event["time"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}:{number}: not an event of a ledger ({error}); delete the line") from error
        events.append(event)
    return events


def joined(ranges: Ranges) -> Ranges:
    """The same numbers in as few half-open ranges as can be, ascending; empty ones are left out."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted((start, stop) for start, stop in ranges if start < stop):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return tuple(out)


def outside(ranges: Ranges, others: Ranges) -> Ranges:
    """The numbers of ``ranges`` that are in none of ``others``, as few half-open ranges, ascending."""
    left = []
    for start, stop in joined(ranges):
        for begin, end in joined(others):
            if begin < stop and start < end:
                left.append((start, begin))
                start = max(start, end)
        left.append((start, stop))
    return joined(tuple(left))
