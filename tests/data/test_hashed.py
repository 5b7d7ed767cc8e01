"""A growing file knows its hash: begun afresh, gone on with, or given up."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data import hashed
from megatron_aquila.data.hashed import HashedFile
from megatron_aquila.data.manifest import FileFacts


def facts(data: bytes) -> FileFacts:
    return FileFacts(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_bytes_and_arrays_are_counted_and_hashed(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        assert file.facts() == facts(b"")
        file.write(b"abc")
        file.write(np.arange(3, dtype="<i2").data)
        whole = b"abc\0\0\1\0\2\0"
        assert file.facts() == facts(whole)
    assert (tmp_path / "file").read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 6])
def test_what_is_kept_is_hashed_again(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed, "CHUNK", 4)
    (tmp_path / "file").write_bytes(b"abcdefgh")
    with HashedFile(tmp_path / "file", kept) as file:
        assert file.facts() == facts(b"abcdefgh"[:kept])
        file.write(b"xy")
    assert (tmp_path / "file").read_bytes() == b"abcdefgh"[:kept] + b"xy"
    assert file.facts() == facts(b"abcdefgh"[:kept] + b"xy")


def test_of_a_failure_nothing_stays_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half-way"), HashedFile(tmp_path / "file") as file:
        raise ValueError("half-way")
    with pytest.raises(ValueError, match="closed file"):
        file.write(b"abc")
    file.abandon()


def test_a_file_that_cannot_be_finished_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    file = HashedFile(tmp_path / "file")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.close()
    with pytest.raises(ValueError, match="closed file"):
        file.write(b"abc")
