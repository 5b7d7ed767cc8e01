"""A built index appears whole or not at all, and what is missing or damaged is named."""

import multiprocessing
import threading
import time
from collections.abc import Iterable
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.progress import Report
from megatron_aquila.errors import DataError

ARRAYS = {"one": np.arange(5), "none": np.zeros(0, dtype=np.int16)}


def arrays(report: Report) -> Iterable[tuple[str, np.ndarray]]:
    return ARRAYS.items()


def test_built_once_and_found_again(tmp_path: Path) -> None:
    calls = []

    def make(report: Report) -> Iterable[tuple[str, np.ndarray]]:
        calls.append(1)
        return ARRAYS.items()

    for folder in (tmp_path / "new" / "cache", tmp_path / "new" / "cache"):
        loaded = IndexCache(folder=folder).arrays({"a": 1}, make, name="x", wanted=ARRAYS)
        for name, values in ARRAYS.items():
            np.testing.assert_array_equal(loaded[name], values, strict=True)
    assert len(calls) == 1
    IndexCache(folder=folder).arrays({"a": 2}, make, name="x", wanted=ARRAYS)
    assert len(calls) == 2
    assert not list(folder.glob("*.tmp"))


def test_others_wait_for_the_builder(tmp_path: Path) -> None:
    waiting = IndexCache(folder=tmp_path, build=False, wait_seconds=20)
    found: list[object] = []
    reader = threading.Thread(
        target=lambda: found.append(waiting.arrays({"a": 1}, dict, name="x", wanted=ARRAYS)["one"].tolist())
    )
    reader.start()
    IndexCache(folder=tmp_path).arrays({"a": 1}, arrays, name="x", wanted=ARRAYS)
    reader.join(timeout=20)
    assert found == [ARRAYS["one"].tolist()]


def test_an_index_nobody_built(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index was built there within 0 s; is --data-cache-path the same"):
        IndexCache(folder=tmp_path, build=False, wait_seconds=0).arrays({"a": 1}, arrays, name="x", wanted=ARRAYS)


def test_two_builders(tmp_path: Path) -> None:
    cache = IndexCache(folder=tmp_path)

    def make_after_another(report: Report) -> Iterable[tuple[str, np.ndarray]]:
        cache.arrays({"a": 1}, arrays, name="x", wanted=ARRAYS)
        return ARRAYS.items()

    assert cache.arrays({"a": 1}, make_after_another, name="x", wanted=ARRAYS)["one"].tolist() == ARRAYS["one"].tolist()
    assert len(list(tmp_path.iterdir())) == 1


def race(folder: Path, start: Barrier, found: "SimpleQueue[tuple[int, list[int]]]", build: bool) -> None:
    """One process of a job: all start together."""
    calls = 0

    def make(report: Report) -> Iterable[tuple[str, np.ndarray]]:
        nonlocal calls
        calls += 1
        for name, values in ARRAYS.items():
            time.sleep(0.05)
            yield name, values

    start.wait()
    for number in range(3):
        arrays = IndexCache(folder=folder, build=build).arrays({"a": number}, make, name="x", wanted=ARRAYS)
        assert list(arrays) == list(ARRAYS)
        assert arrays["one"].tolist() == ARRAYS["one"].tolist()
    found.put((calls, arrays["one"].tolist()))


def test_processes_that_race(tmp_path: Path) -> None:
    """Builders of several jobs and a rank that waits, at once in one folder: all read whole arrays."""
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.SimpleQueue()
    crew = [context.Process(target=race, args=(tmp_path, start, found, rank < 3)) for rank in range(4)]
    for process in crew:
        process.start()
    results = [found.get() for _ in crew]
    for process in crew:
        process.join()
    assert [process.exitcode for process in crew] == [0] * 4
    assert min(calls for calls, _ in results) == 0, "who waits builds nothing"
    assert len(list(tmp_path.iterdir())) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_builder_that_was_killed_is_in_nobodys_way(tmp_path: Path) -> None:
    entry = tmp_path / "abc.1234.tmp"
    entry.mkdir()
    (entry / "one.npy").write_bytes(b"half")
    assert (
        IndexCache(folder=tmp_path).arrays({"a": 1}, arrays, name="x", wanted=ARRAYS)["one"].tolist()
        == ARRAYS["one"].tolist()
    )


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"indices cannot be written.*--data-cache-path"):
        IndexCache(folder=tmp_path / "file").arrays({}, arrays, name="x", wanted=ARRAYS)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match="No space left on device"):
        IndexCache(folder=tmp_path).arrays({}, arrays, name="x", wanted=ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index(tmp_path: Path) -> None:
    cache = IndexCache(folder=tmp_path)
    cache.arrays({}, arrays, name="x", wanted=ARRAYS)
    file = next(tmp_path.glob("*/one.npy"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cannot be read.*delete the folder"):
        cache.arrays({}, arrays, name="x", wanted=ARRAYS)


def test_an_index_that_lacks_an_array(tmp_path: Path) -> None:
    cache = IndexCache(folder=tmp_path)
    cache.arrays({}, arrays, name="x", wanted=ARRAYS)
    next(tmp_path.glob("*/none.npy")).unlink()
    with pytest.raises(DataError, match=r"this index cannot be read \(.*none.npy.*\); delete the folder"):
        cache.arrays({}, arrays, name="x", wanted=ARRAYS)
