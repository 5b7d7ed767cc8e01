"""One run a folder: the second one refuses, what a dead one left is taken over.

``RUN/run.lock`` holds who has the folder, as JSON. Its holder also keeps the file locked by ``flock`` where the file
system can, and renews its modification time, the lease, where another machine has to judge.
"""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_aquila.errors import RunFolderError
from megatron_aquila.observe.processes import process_state, start_ticks

LOCK = "run.lock"
RENEW_SECONDS = 20.0
LEASE_SECONDS = 90.0  # a lease that was not renewed for so long has no living holder
RESTART_SECONDS = 20.0  # how long a restarted run waits for its own dying process


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who has a run's folder. ``token`` is this process's own; ``run_id`` the launcher's, the same after restarts."""

    host: str
    boot: str
    pid: int
    ticks: int
    since: str
    run_id: str
    token: str

    @classmethod
    def here(cls, run_id: str) -> "Holder":
        """This process."""
        return cls(
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=os.getpid(),
            ticks=start_ticks(os.getpid()) or 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            run_id=run_id,
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.since}"

    def shares_kernel(self, other: "Holder") -> bool:
        """Whether both ran on one machine between two of its starts, so that one's process number names it here."""
        return (self.host, self.boot) == (other.host, other.boot)

    def is_same_run(self, other: "Holder") -> bool:
        """Whether a launcher started both of them, one after the other's end."""
        return self.run_id not in ("", "none") and self.run_id == other.run_id


class RunLock:
    """The folder is this process's until ``release``. Made by ``take_lock``."""

    def __init__(self, file: int, path: Path, holder: Holder) -> None:
        self._file, self._path, self._holder = file, path, holder
        self._lost: str | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``RunFolderError`` once another process has taken the folder over: nothing may be written any more."""
        if self._lost is not None:
            raise RunFolderError(self._lost)

    def release(self) -> None:
        """The folder is free. The file stays, empty."""
        self._released.set()
        self._thread.join()
        if self._lost is None:
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                holder = _read(self._file)
                os.utime(self._file)
            except OSError:  # the file system is away: it may come back before the lease is over
                continue
            if holder != self._holder:
                who = "someone" if holder is None else str(holder)
                self._lost = f"{self._path}: {who} took this run's folder over: its lease was not renewed in time"
                return


def take_lock(folder: Path, *, run_id: str = "") -> tuple[RunLock, str | None]:
    """Make ``folder`` this run's, and a line to print where it was taken over from a dead one.

    Raises ``RunFolderError`` naming the process that has it, or the folder that cannot be written.
    """
    path, own = folder / LOCK, Holder.here(run_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}; name a folder that can be written") from error
    try:
        is_locked = _flock(file, own)
        before = _read(file)
        if is_locked is False or (
            before is not None and _lives(before, own, file, folder, can_tell=is_locked is not None)
        ):
            who = "another process" if before is None else str(before)
            raise RunFolderError(
                f"{folder}: a run is writing here: {who}; stop it, choose another folder, or, where that process is "
                f"surely dead, wait {LEASE_SECONDS:.0f} s or remove {path}"
            )
        _write(file, own)
        if is_locked is None:  # two may have come at the same time: the last to write has it
            time.sleep(1.0)
            if _read(file) != own:
                raise RunFolderError(f"{folder}: another run took it at the same moment; choose another folder")
    except BaseException:
        os.close(file)
        raise
    line = None if before is None else f"TOOK OVER {folder} from {before}, which did not leave in order"
    return RunLock(file, path, own), line


def _flock(file: int, own: Holder) -> bool | None:
    """Whether the file could be locked; None where the file system has no locks. Waits for a dying holder.

    The one who dies is this run before its restart, or any process that the kernel no longer lists as living: its
    threads may keep the file for a moment longer than its main thread.
    """
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = _read(file)
            dies = holder is not None and (own.is_same_run(holder) or _is_gone(holder, own))
            if not dies or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:
            return None


def _lives(holder: Holder, own: Holder, file: int, folder: Path, *, can_tell: bool) -> bool:
    """Whether the holder of a file that nobody has locked may still be at work. ``can_tell``: a lock would show."""
    if holder.shares_kernel(own):
        return not can_tell and not _is_gone(holder, own)
    if own.is_same_run(holder):
        return False
    return _age(file, folder) < LEASE_SECONDS


def _is_gone(holder: Holder, own: Holder) -> bool:
    """Whether the holder ran on this machine, since its last start, and does no more."""
    return holder.shares_kernel(own) and process_state(holder.pid, holder.ticks) == "gone"


def _age(file: int, folder: Path) -> float:
    """Seconds since the lease was renewed, by the file system's own clock."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as fresh:
        return os.fstat(fresh.fileno()).st_mtime - os.fstat(file).st_mtime


def _read(file: int) -> Holder | None:
    """Who the file names; None where it is empty or says nothing that we wrote."""
    try:
        found = json.loads(os.pread(file, 4096, 0) or b"null")
        return Holder(**found) if isinstance(found, Mapping) else None
    except (ValueError, TypeError):
        return None


def _write(file: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode()
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))
    os.fsync(file)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
