"""Processes of this machine, as far as /proc tells: does one still live, is it stopped, is it another?"""

from pathlib import Path
from typing import Literal

State = Literal["runs", "stopped", "gone"]


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where there is none, or the system does not say.

    With the pid it names a process for ever: numbers are used again.
    """
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def process_state(pid: int, ticks: int) -> State:
    """What became of the process that had this pid and started at these ticks (0: not known)."""
    fields = _stat(pid)
    if fields is None or fields[0] in ("Z", "X") or (ticks != 0 and int(fields[19]) != ticks):
        return "gone"
    return "stopped" if fields[0] in ("T", "t") else "runs"


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name, which may hold blanks and brackets; the state first."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
