"""Files written by a thread are those that are written at once, whatever happens to the tensors meanwhile."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    written = staging.write(path, entries([torch.ones(100_000)]))
    assert isinstance(written.exception(timeout=10), OSError)
    # all memory is free again
    monkeypatch.undo()
    assert staging.write(tmp_path / "next", entries([torch.ones(100)])).result(timeout=10).size > 400
