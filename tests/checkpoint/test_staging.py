"""Files written by a thread are those that are written at once, whatever happens to the tensors meanwhile."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.checkpoint import staging as staging_module
from megatron_aquila.checkpoint import tensorfile
from megatron_aquila.checkpoint.staging import Staging
from megatron_aquila.checkpoint.tensorfile import Entry, write_tensors

CPU = torch.device("cpu")


def entries(tensors: list[torch.Tensor]) -> list[Entry]:
    return [
        Entry(f"t{number}@0", tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for number, tensor in enumerate(tensors)
    ]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    block=st.sampled_from([8, 16, 1000]),
    blocks=st.integers(1, 3),
)
def test_the_same_file_whatever_the_memory(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block: int, blocks: int
) -> None:
    folder = tmp_path_factory.mktemp("staging")
    dtypes = [torch.float32, torch.bfloat16, torch.int16]
    tensors = [torch.arange(size).to(dtypes[size % 3]) for size in sizes]
    expected = write_tensors(folder / "at once", entries(tensors))
    staging = Staging(CPU, limit_bytes=block * blocks, block_bytes=block)
    for name in ("first", "again"):
        written = staging.write(folder / name, entries(tensors))
        assert written.result(timeout=10) == expected
        assert (folder / name).read_bytes() == (folder / "at once").read_bytes()


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing before the event is set."""
    gate, original = threading.Event(), tensorfile.hashlib.sha256

    def waits() -> object:
        gate.wait(10)
        return original()

    monkeypatch.setattr(tensorfile.hashlib, "sha256", waits)
    return gate


def test_tensors_may_change_as_soon_as_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.ones(100)
    expected = write_tensors(tmp_path / "expected", entries([weights]))
    gate = slow_disk(monkeypatch)
    written = Staging(CPU, limit_bytes=1000, block_bytes=100).write(tmp_path / "file", entries([weights]))
    assert not written.done()
    weights.zero_()  # the optimizer's next step
    gate.set()
    assert written.result(timeout=10) == expected


def test_copying_waits_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = slow_disk(monkeypatch)
    staging = Staging(CPU, limit_bytes=200, block_bytes=100)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    began = time.perf_counter()
    written = staging.write(tmp_path / "file", entries([torch.ones(100)]))
    assert time.perf_counter() - began > 0.15
    assert staging.waited_seconds > 0.15
    assert written.result(timeout=10).size > 400


@pytest.mark.parametrize(("num_blocks", "begins_after"), [(4, 4), (5, 4), (3, 3), (1, 1)])
def test_nothing_is_written_while_training_stands_still_for_the_copy(
    num_blocks: int, begins_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is no other way: the memory is full."""
    staging, taken = Staging(CPU, limit_bytes=100 * num_blocks, block_bytes=100), []
    original, start = staging._filled, threading.Thread.start

    def counts(block: torch.Tensor, size: int) -> object:
        taken.append(size)
        return original(block, size)

    def begins(thread: threading.Thread) -> None:
        taken.append(-1)
        start(thread)

    monkeypatch.setattr(staging, "_filled", counts)
    monkeypatch.setattr(threading.Thread, "start", begins)
    staging.write(tmp_path / "file", entries([torch.ones(100)])).result(timeout=20)
    assert taken.index(-1) == begins_after, taken
    assert sum(size for size in taken if size > 0) == 400


def test_memory_is_taken_ahead_once_and_never_more_than_allowed(tmp_path: Path) -> None:
    staging = Staging(CPU, limit_bytes=350, block_bytes=100)
    for wanted in (150, 150, 10_000, 10):
        staging.prepare(wanted)
    staging._prepared()
    assert staging._num_blocks == staging._free.qsize() == 3
    expected = write_tensors(tmp_path / "expected", entries([torch.ones(70)]))
    assert staging.write(tmp_path / "file", entries([torch.ones(70)])).result(timeout=20) == expected
    assert staging._num_blocks == staging._free.qsize() == 3
    assert staging.waited_seconds == 0.0


def test_memory_that_is_not_to_be_had_ahead_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(CPU, limit_bytes=300, block_bytes=100)

    def none_left(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("cudaHostAlloc: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(staging_module.torch, "empty", none_left)
        staging.prepare(300)
        staging._prepared()
        with pytest.raises(RuntimeError, match="out of memory"):
            staging.write(tmp_path / "file", entries([torch.ones(10)]))
    assert staging.write(tmp_path / "file", entries([torch.ones(10)])).result(timeout=20).size > 40


def test_a_tensor_that_cannot_be_fetched_costs_no_memory(tmp_path: Path) -> None:
    staging = Staging(CPU, limit_bytes=100, block_bytes=100)

    def breaks() -> torch.Tensor:
        raise RuntimeError("the device is gone")

    bad = Entry("bad@0", torch.float32, (10,), breaks)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is gone"):
            staging.write(tmp_path / "file", [*entries([torch.ones(100, dtype=torch.float64)]), bad])
    assert staging.write(tmp_path / "file", entries([torch.ones(100)])).result(timeout=20).size > 400


@pytest.mark.parametrize("fails", ["open", "write", "fsync"])
def test_a_disk_that_fails_holds_up_nobody(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(CPU, limit_bytes=20, block_bytes=10)
    path = tmp_path / "file"
    if fails == "open":
        path = tmp_path / "no" / "folder"
    elif fails == "write":
        path = Path("/dev/full")
    else:
        monkeypatch.setattr(tensorfile.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    written = staging.write(path, entries([torch.ones(5_000)]))
    assert isinstance(written.exception(timeout=10), OSError)
    # all memory is free again
    monkeypatch.undo()
    assert staging.write(tmp_path / "next", entries([torch.ones(100)])).result(timeout=10).size > 400
