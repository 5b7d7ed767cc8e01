"""Breadcrumbs, read: what each rank of a run did last. Any bytes give a trail or a ``RunFolderError``."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_aquila.errors import RunFolderError
from megatron_aquila.observe.breadcrumbs import (
    CAPACITY,
    CHANNEL,
    FILE_BYTES,
    FIRST_RECORD,
    FOLDER,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    RECORD,
    SLOTS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """A group, or a link between two ranks of one; ``key`` is the same on all of them, ``begun`` counts this rank's.

    ``link`` is the link's source and target, None of a group.
    """

    name: str
    key: str
    size: int
    begun: int
    link: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Crumb:
    """One transfer: the ``sequence``-th of its channel. Times are wall clock; None where it has not come to that."""

    number: int
    key: str
    sequence: int
    op: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    step: int
    phase: str
    begun: float
    waits_since: float | None
    ended: float | None

    @property
    def waits(self) -> bool:
        """Whether the host still waits for it."""
        return self.waits_since is not None and self.ended is None

    def what(self) -> str:
        """``all_reduce float64 [4] in step 12 (train)``; both ends of a message read alike."""
        op = "message" if self.op in ("send", "recv") else self.op
        return f"{op} {self.dtype} {list(self.shape)} in step {self.step} ({self.phase})"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTrail:
    """What one rank left. ``attempt`` is the same on all ranks that ran together; ``last`` is its last sign of life."""

    rank: int
    world: int
    pid: int
    start_ticks: int
    host: str
    attempt: str
    began: float
    last: float
    step: int
    phase: str
    has_ended: bool
    channels: dict[str, Channel]
    crumbs: dict[tuple[str, int], Crumb]

    def begun(self, channel: Channel) -> int | None:
        """How many transfers of another rank's ``channel`` this one has begun; None where it has no part in it."""
        own = self.channels.get(channel.key)
        if own is None:
            return 0 if channel.link is not None and self.rank in channel.link else None
        return own.begun

    @property
    def newest(self) -> Crumb | None:
        """The transfer begun last."""
        return max(self.crumbs.values(), key=lambda crumb: crumb.number, default=None)

    @property
    def waiting(self) -> Crumb | None:
        """The transfer that its host waits for, if any."""
        return max(
            (crumb for crumb in self.crumbs.values() if crumb.waits), key=lambda crumb: crumb.number, default=None
        )


def read_trail(path: Path) -> RankTrail:
    """One rank's file. What was being written at that moment is left out. Raises ``RunFolderError``."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}; give the folder that --save or --log-dir named") from error
    if len(data) != FILE_BYTES or data[:8] != MAGIC:
        raise RunFolderError(f"{path}: {len(data)} bytes that are no breadcrumbs of this version; remove the file")
    _, slots, capacity, rank, world, pid, ticks, began, at, step, phase, host, attempt, closed = HEADER.unpack_from(
        data
    )
    if (slots, capacity) != (SLOTS, CAPACITY) or rank >= world or not all(map(math.isfinite, (began, at))):
        raise RunFolderError(f"{path}: its header is damaged; remove the file")
    channels = [_channel(data, slot) for slot in range(SLOTS)]
    found = [_crumb(data, place, channels) for place in range(CAPACITY)]
    crumbs = {(crumb.key, crumb.sequence): crumb for crumb in found if crumb is not None}
    moments = (
        moment for crumb in crumbs.values() for moment in (crumb.begun, crumb.ended or 0, crumb.waits_since or 0)
    )
    return RankTrail(
        rank=rank,
        world=world,
        pid=pid,
        start_ticks=ticks,
        host=_text(host),
        attempt=_text(attempt),
        began=began,
        last=max(at, *moments) if crumbs else at,
        step=step,
        phase=_text(phase),
        has_ended=closed == 1,
        channels={channel.key: channel for channel in channels if channel is not None},
        crumbs=crumbs,
    )


def read_trails(run: Path) -> list[RankTrail]:
    """The ranks of the newest attempt in ``RUN/breadcrumbs``, by rank. Raises ``RunFolderError`` where there are none.

    Files of ranks that ran before and have not come back are left out: who is missing follows from ``world``.
    """
    folder = run / FOLDER
    paths = sorted(folder.glob("rank_*.bin"))
    if not paths:
        raise RunFolderError(f"{folder}: it holds no breadcrumbs; give the folder that --save or --log-dir named")
    trails = [read_trail(path) for path in paths]
    newest = max(trails, key=lambda trail: trail.began).attempt
    return sorted((trail for trail in trails if trail.attempt == newest), key=lambda trail: trail.rank)


def age(moment: float) -> str:
    """How long ago that was, in words."""
    return f"{max(0.0, time.time() - moment):.0f} s"


def _channel(data: bytes, slot: int) -> Channel | None:
    name, size, is_link, digest, begun, source, target = CHANNEL.unpack_from(data, HEADER_BYTES + slot * CHANNEL.size)
    if size == 0:
        return None
    link = (source, target) if is_link == 1 else None
    return Channel(name=_text(name), key=digest.hex(), size=size, begun=begun, link=link)


def _crumb(data: bytes, place: int, channels: list[Channel | None]) -> Crumb | None:
    """The record at that place of the ring; None where there is none, or it is torn or damaged."""
    values = RECORD.unpack_from(data, FIRST_RECORD + place * RECORD.size)
    number, begun, waits_since, ended, sequence, num_bytes, step, slot, dims, *rest = values
    *shape, op, phase, dtype, again = rest
    if number == 0 or number != again or number % CAPACITY != place or slot >= SLOTS or dims > 64:
        return None
    channel = channels[slot]
    if channel is None or not all(map(math.isfinite, (begun, waits_since, ended))):
        return None
    return Crumb(
        number=number,
        key=channel.key,
        sequence=sequence,
        op=_text(op),
        dtype=_text(dtype),
        shape=tuple(shape[:dims]),
        num_bytes=num_bytes,
        step=step,
        phase=_text(phase),
        begun=begun,
        waits_since=waits_since if waits_since > 0 else None,
        ended=ended if ended > 0 else None,
    )


def _text(raw: bytes) -> str:
    return "".join(letter for letter in raw.rstrip(b"\0").decode(errors="replace") if letter.isprintable())
