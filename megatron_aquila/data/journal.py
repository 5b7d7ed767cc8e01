"""``journal.jsonl`` of an output that is not whole: the plan, a line for each shard appended, at last the manifests.

Held locked by who writes the output. A line that a kill cut off was never said.
"""

import fcntl
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from megatron_aquila.data.shards import Shard, shard_of
from megatron_aquila.errors import DataError

PATIENCE: Final = 10.0  # seconds in which the workers of a killed run are gone


@dataclass(frozen=True, slots=True)
class Appended:
    """A shard as it was appended, with the size and the SHA-256 of each growing file behind it."""

    shard: Shard
    ends: dict[str, int]
    digests: dict[str, str]


@dataclass(frozen=True, slots=True)
class Story:
    """What a journal tells: ``plan`` is None where nothing was begun.

    ``manifests`` and ``extra``, the names of the files beside the data sets, are those of a run that was stopped while
    it gave its files their names; None before.
    """

    plan: Mapping[str, Any] | None = None
    appended: tuple[Appended, ...] = ()
    manifests: dict[str, Any] | None = None
    extra: tuple[str, ...] = ()


class Journal:
    """The journal in ``folder``, made where there is none, and locked.

    Raises:
        DataError: another process is at it.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        self._file = self.path.open("a+b")
        self._lock()

    def _lock(self) -> None:
        """Workers of a killed run hold the lock until they notice."""
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > patience:
                    self._file.close()
                    raise DataError(f"{self.path.parent}: another process is writing it; wait for its end") from None
                time.sleep(0.05)

    def read(self) -> Story:
        """All whole lines; what is behind them is cut off.

        Raises:
            DataError: a line that no journal has.
        """
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        plan, appended, last, number = None, [], {}, 0
        try:
            for line in whole.splitlines():
                number += 1
                last = {**json.loads(line)}
                if plan is None:
                    plan = last
                elif "manifests" not in last:
                    appended.append(Appended(shard_of(last), {**last["ends"]}, {**last["digests"]}))
            return Story(plan, tuple(appended), last.get("manifests"), tuple(last.get("extra", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}:{number}: no line of a journal, it was damaged ({error}); give --overwrite to begin "
                f"anew, or remove {self.path.parent}"
            ) from error

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Forget everything and write the plan."""
        self._file.truncate(0)
        self._write(plan)

    def add(self, appended: Appended) -> None:
        """Say that a shard was appended."""
        self._write({**asdict(appended.shard), "ends": appended.ends, "digests": appended.digests})

    def finish(self, manifests: Mapping[str, Any], extra: Sequence[str]) -> None:
        """Say that everything is written and only the names are left to give."""
        self._write({"manifests": manifests, "extra": list(extra)})

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
