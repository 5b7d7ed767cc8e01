"""Two runs never write into one folder; what a dead one left does not stop the next."""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.errors import RunFolderError
from megatron_aquila.train import lock
from megatron_aquila.train.lock import LEASE_SECONDS, LOCK, Holder, take_lock


def holds(folder: Path, run_id: str, pipe: Connection) -> None:
    take_lock(folder, run_id=run_id)
    pipe.send(os.getpid())
    time.sleep(60)


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """``other(run_id)``: another process that has the folder."""
    started = []

    def start(run_id: str = "") -> int:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("forkserver").Process(target=holds, args=(tmp_path, run_id, theirs))
        process.start()
        started.append(process)
        return int(ours.recv())

    yield start
    for process in started:
        process.kill()
        process.join()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def left_by(folder: Path, holder: Holder, *, age: float = 0.0) -> None:
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


@pytest.mark.parametrize("locks", [True, False])
def test_the_second_run_is_refused_and_told_who_has_the_folder(
    tmp_path: Path, other: Callable[..., int], monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    pid = other("first")
    if not locks:
        without_locks(monkeypatch)
    with pytest.raises(RunFolderError, match=rf"process {pid} on {re.escape(os.uname().nodename)}, started 20"):
        take_lock(tmp_path, run_id="second")


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_run_left_is_taken_over_aloud(
    tmp_path: Path, other: Callable[..., int], monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    pid = other()
    if not locks:
        without_locks(monkeypatch)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    held, line = take_lock(tmp_path)
    assert line is not None
    assert f"TOOK OVER {tmp_path} from process {pid}" in line
    held.release()


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while lock.process_state(pid, 0) != "gone":
        assert time.monotonic() < deadline, f"{pid} lives"


def test_a_released_folder_is_free_and_a_restart_waits_for_its_own_dying_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, line = take_lock(tmp_path, run_id="r")
    assert line is None
    slept = []

    def release(seconds: float) -> None:
        slept.append(seconds)
        held.release()

    monkeypatch.setattr(lock, "time", FakeTime(release))
    again, line = take_lock(tmp_path, run_id="r")
    assert slept
    assert line is None
    again.release()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_a_dead_process_whose_threads_still_hold_the_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).touch()
    file = os.open(tmp_path / LOCK, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    left_by(tmp_path, replace(Holder.here(""), pid=2**22 + 1))  # above the kernel's highest
    monkeypatch.setattr(lock, "time", FakeTime(lambda _: os.close(file)))
    held, line = take_lock(tmp_path)
    assert line is not None
    assert "TOOK OVER" in line
    held.release()


class FakeTime:
    """``time``, but what sleeps."""

    monotonic, strftime = staticmethod(time.monotonic), staticmethod(time.strftime)

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self.sleep = sleep


def test_another_machine_is_judged_by_its_lease(tmp_path: Path) -> None:
    elsewhere = replace(Holder.here("r"), host="node7", boot="another")
    left_by(tmp_path, elsewhere)
    with pytest.raises(RunFolderError, match=r"process \d+ on node7"):
        take_lock(tmp_path, run_id="q")
    left_by(tmp_path, elsewhere, age=LEASE_SECONDS + 5)
    held, line = take_lock(tmp_path, run_id="q")
    assert line is not None
    held.release()
    left_by(tmp_path, elsewhere)
    take_lock(tmp_path, run_id="r")[0].release()  # the same run, restarted on another node
    left_by(tmp_path, replace(elsewhere, run_id="none"))
    with pytest.raises(RunFolderError):  # torchrun's default name is nobody's
        take_lock(tmp_path, run_id="none")


@pytest.mark.parametrize("junk", [b"{", b"[1]", b"\xff\xfe", b'{"host": 1}'])
def test_a_file_that_says_nothing_stops_nobody(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / LOCK).write_bytes(junk)
    take_lock(tmp_path)[0].release()


def test_of_two_that_come_at_once_without_locks_the_last_to_write_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: left_by(tmp_path, replace(Holder.here(""), token="other")))
    with pytest.raises(RunFolderError, match="at the same moment"):
        take_lock(tmp_path)


def test_the_lease_is_renewed_and_a_lost_one_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    held, _ = take_lock(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < deadline, "the lease was not renewed"
    held.check()
    left_by(tmp_path, replace(Holder.here(""), host="node7"))
    while held._lost is None:
        assert time.monotonic() < deadline, "nobody noticed"
    with pytest.raises(RunFolderError, match=r"node7, started .* took this run's folder over"):
        held.check()
    held.release()
    assert (tmp_path / LOCK).read_bytes(), "what is another's is not emptied"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="name a folder that can be written"):
        take_lock(tmp_path / "file")
