"""What each rank did last, in a small file that outlives the process: one crumb a transfer.

``RUN/breadcrumbs/rank_00000.bin`` is a shared mapping, so that it is whole after SIGKILL and can be read while the run
hangs. In the machine's own byte order and alignment:

| at | what |
|---|---|
| 0 | ``HEADER``: magic, sizes, rank and world, the process, and where the run stands |
| 512 | ``SLOTS`` channels (``CHANNEL``): a group, or a link between two ranks of one, and what it began |
| 512 + 64 ``SLOTS`` | ``CAPACITY`` records (``RECORD``): a ring of the newest transfers; ``n`` at ``n % CAPACITY`` |

A record begins and ends with its number, counted from 1: where the two differ, it was being written.
"""

import mmap
import os
import struct
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megatron_aquila.observe.processes import start_ticks

MAGIC = b"AQCRUMB1"
FOLDER = "breadcrumbs"
SLOTS, CAPACITY = 256, 4096
# magic, slots, capacity, rank, world, pid, the process's start in ticks, began, came to the phase at, step, phase,
# host, attempt, closed
HEADER = struct.Struct("@8sIIIIQQddI12s64s36sI")
# name, members, whether it is a link, digest of name and members, transfers begun, the link's source and target
CHANNEL = struct.Struct("@24sII16sQII")
# number, begun, waited for since, ended, how-many-th of its channel, bytes, step, channel, dims, four sizes, op, phase,
# dtype, number
RECORD = struct.Struct("@QdddQQIHH4I16s12s12s4xQ")
HEADER_BYTES = 512
FIRST_RECORD = HEADER_BYTES + SLOTS * CHANNEL.size
FILE_BYTES = FIRST_RECORD + CAPACITY * RECORD.size
_FIRST_COUNT, _COUNT_STEP = (HEADER_BYTES + 48) // 8, CHANNEL.size // 8  # in eights of bytes
_write_record = RECORD.pack_into
_AT, _STEP = 48, struct.Struct("@dI12s")  # where the header keeps the phase, to be written again at each


def file_name(rank: int) -> str:
    """``rank_00003.bin``."""
    return f"rank_{rank:05d}.bin"


def stack_name(rank: int) -> str:
    """``rank_00003.stack``: where a rank writes what its threads were doing."""
    return f"rank_{rank:05d}.stack"


class Recorder:
    """One rank's trail: notes every transfer, in memory until ``keep_in`` names the run's folder.

    ``waited``: seconds spent waiting for transfers so far. ``last``: when anything was noted last. ``attempt`` is the
    same on the ranks that run together.
    """

    def __init__(self, *, rank: int = 0, world: int = 1, attempt: str = "") -> None:
        self.run: Path | None = None
        self.rank, self.world, self.waited, self.last = rank, world, 0.0, time.time()
        self.step, self.phase = 0, b"start"
        self._use(mmap.mmap(-1, FILE_BYTES))
        self._number = self._channels = 0
        self._names: dict[object, bytes] = {}
        host = os.uname().nodename.encode()[:64]
        values = (MAGIC, SLOTS, CAPACITY, rank, world, os.getpid(), start_ticks(os.getpid()) or 0, self.last, self.last)
        HEADER.pack_into(self._map, 0, *values, 0, self.phase, host, attempt.encode()[:36], 0)

    def keep_in(self, run: Path) -> None:
        """Keep the trail in ``RUN/breadcrumbs`` from now on, what is noted already included. Raises OSError."""
        mapped = _mapping(run / FOLDER / file_name(self.rank))
        mapped[:] = self._map[:]
        self._release()
        self._use(mapped)
        self.run = run

    def at(self, step: int, phase: str) -> None:
        """The run has come to ``phase`` of ``step``."""
        self.step, self.phase, self.last = step, phase.encode(), time.time()
        _STEP.pack_into(self._map, _AT, self.last, step, self.phase)

    def group(self, name: str, ranks: tuple[int, ...]) -> "GroupRecorder":
        """The trail of a group of these global ranks."""
        return GroupRecorder(self, name, ranks)

    def channel(self, name: str, members: tuple[int, ...], *, is_link: bool) -> int:
        """The slot of a new channel between ``members``; a link goes from the first of them to the second."""
        slot, ends = self._channels, members[:2] if is_link else (0, 0)
        assert slot < SLOTS, f"channel {name} is the {slot + 1}th, breadcrumbs have room for {SLOTS}"
        digest = blake2b(repr((name, members)).encode(), digest_size=16).digest()
        values = (name.encode()[:24], len(members), int(is_link), digest, 0, *ends)
        CHANNEL.pack_into(self._map, HEADER_BYTES + slot * CHANNEL.size, *values)
        self._channels += 1
        return slot

    def begin(self, slot: int, sequence: int, op: str, x: Any, *, waits: bool) -> int:
        """Note a transfer of ``x``, the ``sequence``-th of its channel; returns its number."""
        self._number = number = self._number + 1
        self.last = now = time.time()
        shape, names = x.shape, self._names
        _write_record(
            self._map,
            FIRST_RECORD + number % CAPACITY * RECORD.size,
            number,
            now,
            now if waits else 0.0,
            0.0,
            sequence,
            x.nbytes,
            self.step,
            slot,
            len(shape),
            *(*shape, 0, 0, 0, 0)[:4],
            names.get(op) or self._text(op),
            self.phase,
            names.get(x.dtype) or self._text(x.dtype),
            number,
        )
        self._counts[_FIRST_COUNT + slot * _COUNT_STEP] = sequence
        return number

    def waits(self, number: int) -> None:
        """The host waits for transfer ``number`` from now on."""
        if number > self._number - CAPACITY:
            self.last = self._times[((FIRST_RECORD + number % CAPACITY * RECORD.size) >> 3) + 2] = time.time()

    def ends(self, number: int) -> None:
        """Transfer ``number`` is done."""
        if number > self._number - CAPACITY:
            place = (FIRST_RECORD + number % CAPACITY * RECORD.size) >> 3
            self.last = self._times[place + 3] = now = time.time()
            self.waited += now - (self._times[place + 2] or now)

    def lost(self, number: int) -> str:
        """Which transfer it was, and who knows more."""
        fields = RECORD.unpack_from(self._map, FIRST_RECORD + number % CAPACITY * RECORD.size)
        channel = CHANNEL.unpack_from(self._map, HEADER_BYTES + fields[7] * CHANNEL.size)
        where = f"{_spelled(channel[0])} #{fields[4]}, {_spelled(fields[13])} in step {fields[6]} ({self._phase()})"
        whose = "keep breadcrumbs with --save or --log-dir to learn which"
        if self.run is not None:
            whose = f"`aquila doctor hang {self.run}` names it"
        return f"another rank is gone, stuck or late: noticed in {where}; {whose}"

    def close(self) -> None:
        """The run ends in order. The file stays."""
        self.at(self.step, "end")
        struct.pack_into("@I", self._map, HEADER.size - 4, 1)

    def _use(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self._times, self._counts = memoryview(mapped).cast("d"), memoryview(mapped).cast("Q")

    def _release(self) -> None:
        self._times.release()
        self._counts.release()
        self._map.close()

    def _phase(self) -> str:
        return _spelled(self.phase)

    def _text(self, value: object) -> bytes:
        found = self._names[value] = str(value).rpartition(".")[2].encode()
        return found


class GroupRecorder:
    """The trail of one group: a channel for its collectives, and one for each link between two of its ranks."""

    def __init__(self, recorder: Recorder, name: str, ranks: tuple[int, ...]) -> None:
        self._recorder, self._name = recorder, name
        # link -> its slot, and transfers begun
        self._open: dict[tuple[int, int] | None, list[int]] = {None: [recorder.channel(name, ranks, is_link=False), 0]}
        self.waits, self.ends, self.lost = recorder.waits, recorder.ends, recorder.lost

    def begin(self, op: str, x: Any, *, link: tuple[int, int] | None, waits: bool) -> int:
        """A transfer of ``x`` is launched; its number."""
        state = self._open.get(link)
        if state is None:
            assert link is not None, f"group {self._name} has lost its channel"
            slot = self._recorder.channel(f"{self._name} {link[0]}>{link[1]}", link, is_link=True)
            state = self._open[link] = [slot, 0]
        state[1] += 1
        return self._recorder.begin(state[0], state[1], op, x, waits=waits)


def _spelled(text: bytes) -> str:
    return text.rstrip(b"\0").decode(errors="replace")


def _mapping(path: Path) -> mmap.mmap:
    """A fresh zeroed mapping; the trail of an attempt before stays beside, as ``.previous``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w+b") as file:
        # A file with holes would be a SIGBUS, and no error, where the disk is full.
        os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        mapped = mmap.mmap(file.fileno(), FILE_BYTES)
    if path.exists():
        os.replace(path, path.with_suffix(".previous"))
    os.replace(temporary, path)
    return mapped
