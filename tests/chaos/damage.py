"""What is done to a run's folder or its data before a start, and undone after one that had to refuse."""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from megatron_aquila.checkpoint.folders import LATEST, find_checkpoint
from megatron_aquila.checkpoint.integrity import examine
from megatron_aquila.data.verify import verify
from megatron_aquila.observe.ledger import LEDGER_NAME
from megatron_aquila.train.lock import LOCK, Holder
from tests.chaos.faults import Fault

T = TypeVar("T")
Undo = Callable[[], None]


def damage(fault: Fault, run: Path, prefixes: list[str], filler: Path | None) -> tuple[Undo, list[str]]:
    """Do what the fault says; how to undo it, and what ``ckpt verify`` or ``data verify`` say of it.

    ``filler`` may fill the disk that ``run`` is on.
    """
    share = fault.share
    if fault.kind in ("cut-checkpoint", "flip-checkpoint"):
        folder = find_checkpoint(run)
        spoil(pick(sorted(folder.iterdir()), share), share, cut=fault.kind.startswith("cut"))
        return nothing, examine(folder)
    if fault.kind in ("cut-data", "flip-data"):
        is_cut = fault.kind.startswith("cut")
        prefix = pick(prefixes, share)
        file = Path(prefix + (".idx" if is_cut and share * 100 % 1 > 0.5 else ".bin"))
        whole, times = file.read_bytes(), file.stat()
        spoil(file, share, cut=is_cut)

        def undo() -> None:
            file.write_bytes(whole)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

        return undo, list(verify(prefix).problems)
    if fault.kind == "full-start":
        assert filler is not None, "the disk is not small: it cannot be filled"
        full = filler.with_name("full")  # the filler goes at the next start
        fill(full)
        return full.unlink, []
    if fault.kind == "lose-latest":
        lose(run / LATEST, share)
    elif fault.kind == "torn-ledger":
        with (run / LEDGER_NAME).open("ab") as ledger:
            ledger.write(b'{"event": "checkpoint", "time": "2026-01-01T00:00:00", "name": "step_0000002", "par')
    else:
        leave_lock(run, of_another_machine=fault.kind == "foreign-lock" or share > 0.5)
    if fault.kind == "foreign-lock":
        os.utime(run / LOCK)
        return (run / LOCK).unlink, []
    return nothing, []


def nothing() -> None:
    """What is damaged stays so."""


def fill(filler: Path) -> None:
    """Leave the disk without a byte."""
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


def pick(among: Sequence[T], share: float) -> T:
    """One of them."""
    return among[int(share * len(among))]


def spoil(file: Path, share: float, *, cut: bool) -> None:
    """Cut the file off, or flip one of its bits."""
    data = bytearray(file.read_bytes())
    place = int((share * 7919) % 1 * len(data))
    if cut:
        os.truncate(file, place)
        return
    data[place] ^= 1 << int(share * 8)
    file.write_bytes(data)


def lose(latest: Path, share: float) -> None:
    """Gone, empty, or not a name."""
    if share < 1 / 3:
        latest.unlink()
    else:
        latest.write_bytes(b"" if share < 2 / 3 else b"step_\xff\x00\n")


def leave_lock(run: Path, *, of_another_machine: bool) -> None:
    """As a run leaves it that was killed here, or with a machine whose lease is over."""
    here = asdict(Holder.here("another"))
    gone = here | {"pid": 2**22 - 7, "ticks": 1}
    if of_another_machine:
        gone |= {"host": socket.gethostname() + "-b", "boot": "another"}
    with suppress(FileNotFoundError):
        (run / LOCK).unlink()
    (run / LOCK).write_text(json.dumps(gone))
    if of_another_machine:
        os.utime(run / LOCK, (time.time() - 1000,) * 2)
