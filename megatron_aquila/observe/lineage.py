"""What a run's ledger proves: where its last checkpoint comes from, and that no sample is in it twice or never."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megatron_aquila.observe.ledger import Event, Ranges, joined, outside


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint in a lineage. ``ranges`` are the samples that steps took since ``parent``."""

    name: str
    step: int
    samples: int
    ranges: Ranges = ()
    skipped: Ranges = ()
    parent: "Saved | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerReport:
    """What a ledger says of its run.

    ``lineage``: the checkpoints from which the last one comes, it last. ``problems``: what must not be, in words: a
    sample twice or never, work lost beyond the last checkpoint, a start from nowhere. ``skipped``: samples that the
    last checkpoint counts as consumed and was not trained on. ``killed``: how often the run began anew without having
    stopped. ``given_up``: ranges of samples that were trained on and then abandoned, by a rewind, a kill or on purpose,
    as far as a checkpoint or a stop tells of them; what came after is trained on again or skipped.
    """

    lineage: tuple[Saved, ...]
    problems: tuple[str, ...]
    starts: int
    killed: int
    rewinds: int
    fallbacks: int
    skipped: Ranges
    given_up: Ranges

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def consumed(self) -> Ranges:
        """The samples that the last checkpoint has seen or skipped."""
        return joined(tuple(one for saved in self.lineage for one in saved.ranges))


ROOT = Saved("the beginning", 0, 0)


@dataclass
class _Walk:
    """The ledger read from its first line to one of its lines."""

    here: Saved = ROOT  # what the run goes on from
    last: Saved | None = None  # the checkpoint written last
    known: dict[str, Saved] = field(default_factory=dict)  # by name, the newest of each
    running: bool = False
    passed_over: bool = False  # the last checkpoint was found damaged, or given up on purpose
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("start", "rewind", "fallback", "killed"), 0))
    given_up: list[tuple[int, int]] = field(default_factory=list)
    left_out: dict[str, Ranges] = field(default_factory=dict)  # by rewinds, after a checkpoint of this name
    problems: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """One event."""
        kind = event["event"]
        if kind in self.counts:
            self.counts[kind] += 1
        if kind == "start":
            self._start(event)
        elif kind == "checkpoint":
            self._checkpoint(event)
        elif kind == "rewind":
            self._rewind(event)
        elif kind == "fallback":
            self.passed_over = True
        elif kind == "stop":
            self._stop(event)

    def _start(self, event: Event) -> None:
        self.counts["killed"] += self.running
        self.running = True
        found = event["checkpoint"]
        begin = self._found(found) if found is not None else ROOT
        if found is not None and found.get("ephemeral"):
            ahead = Saved(f"ephemeral {found['name']}", found["step"], found["samples"], _ranges(found["ranges"]))
            self.problems += tiling_problems(ahead, begin.samples)
            if ahead.samples != event["samples"]:
                self.problems.append(
                    f"a start at sample {event['samples']} from {ahead.name}, which has {ahead.samples}"
                )
        elif begin.samples != event["samples"]:
            self.problems.append(f"a start at sample {event['samples']} from {begin.name}, which has {begin.samples}")
        if self.last is not None and begin is not self.last:
            if event["origin"] == "auto" and not self.passed_over:
                self.problems.append(f"work is lost: a start from {begin.name} though {self.last.name} was saved last")
            self.given_up += _since(self.last, begin)
        self.here, self.passed_over = begin, False

    def _found(self, found: Any) -> Saved:
        """The checkpoint of a start; one of another folder begins the lineage here."""
        if found.get("ephemeral"):  # what it took is still to be saved: the run stands at the durable one before it
            here = self.here.name.rpartition("/")[2]  # of a path, where the run began from another folder
            if found["parent"] is not None and found["parent"] not in self.known and found["parent"] != here:
                self.problems.append(f"an ephemeral start after {found['parent']}, of whose saving nothing is written")
            return ROOT if found["parent"] is None else self.known.get(found["parent"], self.here)
        if not found["own"]:
            return Saved(found["path"], found["step"], found["samples"], ranges=((0, found["samples"]),))
        if found["name"] not in self.known:
            self.problems.append(f"a start from {found['name']}, of whose saving nothing is written")
            return Saved(found["name"], found["step"], found["samples"], ranges=((0, found["samples"]),))
        return self.known[found["name"]]

    def _checkpoint(self, event: Event) -> None:
        saved = Saved(
            event["name"],
            event["step"],
            event["samples"],
            _ranges(event["ranges"]),
            _ranges(event["skipped"]),
            self.here,
        )
        if self.here is not ROOT and event["parent"] != self.here.name.rpartition("/")[2]:
            self.problems.append(
                f"{saved.name} names {event['parent']} as its parent, the run went on from {self.here.name}"
            )
        self.problems += tiling_problems(saved, self.here.samples)
        for start, stop in outside(self._left_out_until(saved.samples), saved.skipped):
            self.problems.append(f"{saved.name}: samples {start} to {stop} are in it, though a rewind left them out")
        self.left_out.pop(saved.name, None)
        self.known[saved.name] = self.here = self.last = saved
        self.passed_over = False

    def _rewind(self, event: Event) -> None:
        self.given_up += _ranges(event["ranges"])
        target = self.known.get(event["checkpoint"], self.here)
        if target.name.rpartition("/")[2] != event["checkpoint"]:
            self.problems.append(f"a rewind to {event['checkpoint']}, of whose saving nothing is written")
        self.given_up += _since(self.here, target)
        for saved in _line(target):
            self.left_out[saved.name] = (*self.left_out.get(saved.name, ()), *_ranges(event["skipped"]))
        self.here, self.passed_over = target, target is not self.last

    def _left_out_until(self, samples: int) -> Ranges:
        """What a checkpoint at ``samples`` that comes from ``here`` must not have been trained on."""
        ranges = self.left_out.get(self.here.name, ())
        return tuple((max(start, self.here.samples), min(stop, samples)) for start, stop in ranges)

    def _stop(self, event: Event) -> None:
        self.running = False
        beyond = event["samples"] - self.here.samples
        if beyond > 0 and not event["failed"] and self.last is not None:
            self.problems.append(f"work is lost: a stop {beyond} samples beyond {self.here.name} without a save")
        self.given_up += _ranges(event["ranges"])


def check_ledger(events: Sequence[Event]) -> LedgerReport:
    """Follow the run through its ledger. Events of unknown kinds are passed over."""
    walk = _walked(events)
    return LedgerReport(
        lineage=() if walk.last is None else tuple(reversed(_line(walk.last))),
        problems=tuple(walk.problems),
        starts=walk.counts["start"],
        killed=walk.counts["killed"],
        rewinds=walk.counts["rewind"],
        fallbacks=walk.counts["fallback"],
        skipped=() if walk.last is None else walk.last.skipped,
        given_up=joined(tuple(walk.given_up)),
    )


def left_out_after(events: Sequence[Event], *names: str) -> Ranges:
    """The samples that rewinds left out since a checkpoint was saved: a run that goes on from it leaves them out too.

    ``names`` are its own, or of one that the run came from the paths that starts may have told. A rewind further on
    counts as well.
    """
    left_out = _walked(events).left_out
    return joined(tuple(one for name in names for one in left_out.get(name, ())))


def _walked(events: Sequence[Event]) -> _Walk:
    walk = _Walk()
    for event in events:
        walk.take(event)
    return walk


def _line(saved: Saved) -> list[Saved]:
    """A checkpoint and those it comes from, the newest first."""
    line: list[Saved] = []
    at: Saved | None = saved
    while at is not None and at is not ROOT:
        line.append(at)
        at = at.parent
    return line


def tiling_problems(saved: Saved, begin: int) -> list[str]:
    """Where the ranges of ``saved`` are not exactly the samples from ``begin`` to its own, each once."""
    wrong = []
    borders = [(begin, begin), *sorted(saved.ranges), (saved.samples, saved.samples)]
    for (_, before), (start, _) in pairwise(borders):
        if start > before:
            wrong.append(f"{saved.name}: samples {before} to {start} were never taken")
        elif start < before:
            wrong.append(f"{saved.name}: samples {start} to {before} were taken twice")
    return wrong


def _since(saved: Saved, ancestor: Saved) -> list[tuple[int, int]]:
    """What ``saved`` took that is not in ``ancestor``, where that is one."""
    found: list[tuple[int, int]] = []
    at: Saved | None = saved
    while at is not None and at is not ancestor and at.samples > ancestor.samples:
        found += at.ranges
        at = at.parent
    return found


def _ranges(values: Sequence[Sequence[int]]) -> Ranges:
    return tuple((start, stop) for start, stop in values)
