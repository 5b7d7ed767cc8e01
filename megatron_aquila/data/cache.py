"""Built indices on disk: a folder of .npy files that appears whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.progress import Report, ignore
from megatron_aquila.errors import DataError

FORMAT: Final = 2  # raise it when the meaning of a cached array changes
POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Blocks:
    """An array that comes in blocks of its rows, so that no memory is needed for all of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Iterator[NDArray[Any]]


Arrays: TypeAlias = Iterable[tuple[str, NDArray[Any] | Blocks]]


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexCache:
    """Where built indices live, and whether this process may build them.

    ``build``: build what is missing; else wait up to ``wait_seconds`` for another process to have built it.
    ``report``: is told how far a build is.
    """

    folder: Path
    build: bool = True
    wait_seconds: float = 60.0
    report: Report = ignore

    def arrays(
        self, key: Mapping[str, object], make: Callable[[Report], Arrays], *, name: str, wanted: Collection[str]
    ) -> Mapping[str, NDArray[Any]]:
        """The arrays ``wanted``, which ``make`` gives for ``key``, memory-mapped; built and published where missing.

        ``key`` names everything the values depend on, by content: data that was moved finds its index, data that was
        written again does not. Two builders at once are harmless: the values are the same, and the second finds the
        first's folder. ``name`` is for people.

        Raises:
            DataError: the folder cannot be written or read, or lacks an array; or nobody built them in time.
        """
        description = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1)
        entry = self.folder / hashlib.sha256(description.encode()).hexdigest()[:32]
        if self.build and not entry.exists():
            self._publish(entry, make(lambda what, *done: self.report(f"{name}: {what}", *done)), description)
        deadline = time.monotonic() + self.wait_seconds
        while not entry.exists():
            if time.monotonic() > deadline:
                raise DataError(
                    f"{entry}: no index was built there within {self.wait_seconds:g} s; "
                    "is --data-cache-path the same folder for every process of this node?"
                )
            time.sleep(POLL_SECONDS)
        return _load(entry, wanted)

    def _publish(self, entry: Path, arrays: Arrays, description: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=self.folder))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            beside.chmod(0o755)
            (beside / "description.json").write_text(description, encoding="utf-8")
            for name, values in arrays:
                with (beside / f"{name}.npy").open("wb") as file:
                    _save(file, values)
                    file.flush()
                    os.fsync(file.fileno())
            beside.rename(entry)
        except OSError as error:
            if not entry.exists():
                raise _unwritable(self.folder, error) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _save(file: BinaryIO, values: NDArray[Any] | Blocks) -> None:
    if not isinstance(values, Blocks):
        np.save(file, values, allow_pickle=False)
        return
    described = {
        "descr": np.lib.format.dtype_to_descr(values.dtype),
        "fortran_order": False,
        "shape": values.shape,
    }
    np.lib.format.write_array_header_1_0(file, described)
    for rows in values.rows:
        file.write(np.ascontiguousarray(rows, dtype=values.dtype).data)


def _load(entry: Path, wanted: Collection[str]) -> Mapping[str, NDArray[Any]]:
    try:
        return {name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in wanted}
    except (OSError, ValueError) as error:
        raise DataError(f"{entry}: this index cannot be read ({error}); delete the folder to build it again") from error


def _unwritable(folder: Path, error: OSError) -> DataError:
    reason = error.strerror or str(error)
    return DataError(f"{folder}: indices cannot be written: {reason}; give a folder that can with --data-cache-path")
