"""What can befall a run, and what must become of it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Ending = Literal["dies", "stops", "refuses", "goes on"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A class of faults.

    ``ending`` is how the start that it befalls has to end: it ``dies`` and leaves no word, ``stops`` in order with
    status 0, ``refuses`` with a reason in words, or ``goes on`` as if nothing had been. ``reason`` is what has to be
    in its output then. ``inside``: hooks of the run's own processes inject it, else it is done to the folder before.
    """

    title: str
    ending: Ending
    inside: bool = True
    reason: str = ""
    rank_0: bool = False  # only rank 0 comes to that place
    status: int | None = None  # of a start that refuses; 2, unless it says another


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "kill-start": Kind(title="SIGKILL while starting", ending="dies"),
        "kill-step": Kind(title="SIGKILL at a random moment of training", ending="dies"),
        "kill-copy": Kind(title="SIGKILL in a save: while it is copied", ending="dies"),
        "kill-write": Kind(title="SIGKILL in a save: while it is written", ending="dies"),
        "kill-rename": Kind(title="SIGKILL in a save: before the rename", ending="dies", rank_0=True),
        "kill-latest": Kind(title="SIGKILL in a save: before `latest`", ending="dies", rank_0=True),
        "kill-ledger": Kind(title="SIGKILL in a save: before the ledger's line", ending="dies", rank_0=True),
        "hang": Kind(title="SIGSTOP: the run hangs, `doctor hang` names the rank", ending="dies"),
        "term-start": Kind(title="SIGTERM while starting", ending="dies"),
        "term-step": Kind(title="SIGTERM in training", ending="stops", reason="stopped at step"),
        "term-eval": Kind(title="SIGTERM in a validation", ending="stops", reason="stopped at step"),
        "term-save": Kind(title="SIGTERM in a save", ending="stops", reason="stopped at step"),
        "full-disk": Kind(title="the disk is full in a save", ending="refuses", reason="could not be saved"),
        "full-start": Kind(
            title="the disk is full at a start", ending="refuses", inside=False, reason="No space left on device"
        ),
        "nan-skip": Kind(title="NaN in a gradient, `--on-nonfinite skip`", ending="goes on", reason="not finite"),
        "nan-rewind": Kind(title="NaN in a gradient, `rewind`", ending="goes on", reason="back to step_"),
        "kill-rewind": Kind(title="SIGKILL after a rewind, before its next step", ending="dies"),
        "term-rewind": Kind(
            title="SIGTERM after a rewind, before its next step", ending="stops", reason="back to step_"
        ),
        "nan-stop": Kind(title="NaN in a gradient, `stop`", ending="refuses", reason="the update was left out"),
        "flip-weight": Kind(
            title="a bit flipped in one replica's weights", ending="refuses", reason="replicas have drifted", status=4
        ),
        "cut-checkpoint": Kind(title="checkpoint file cut off", ending="goes on", inside=False, reason="DAMAGED"),
        "flip-checkpoint": Kind(title="bit flipped in a checkpoint", ending="goes on", inside=False, reason="DAMAGED"),
        "lose-latest": Kind(title="`latest` lost or garbled", ending="goes on", inside=False, reason="LOST `latest`"),
        "torn-ledger": Kind(title="ledger's last line torn", ending="goes on", inside=False),
        "stale-lock": Kind(title="lock of a dead run", ending="goes on", inside=False, reason="TOOK OVER"),
        "foreign-lock": Kind(
            title="lock of a run on another machine",
            ending="refuses",
            inside=False,
            reason="a run is writing here",
        ),
        "cut-data": Kind(title="data file cut off", ending="refuses", inside=False, reason="write the data set again"),
        "flip-data": Kind(title="bit flipped in a data file", ending="refuses", inside=False, reason="digest"),
        "two-runs": Kind(title="a second run on the same folder", ending="refuses", reason="a run is writing here"),
    }
)
# what is trained on is not what it would have been
BAD_NUMBERS = ("nan-skip", "nan-rewind", "kill-rewind", "term-rewind", "nan-stop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One injection: on which rank, after how many of a start's steps, saves or validations, and where in that.

    ``number`` counts the faults of a run.
    """

    number: int
    kind: str
    rank: int
    after: int
    share: float


def draw(kinds: Sequence[str], rng: random.Random, *, world: int = 2) -> list[Fault]:
    """A fault of each of ``kinds`` in this order, the rest at random."""
    return [
        Fault(
            number=number,
            kind=kind,
            rank=0 if KINDS[kind].rank_0 else rng.randrange(world),
            after=rng.randint(2, 4) if kind in ("kill-step", "term-step", "hang", *BAD_NUMBERS) else 1,
            share=rng.random(),
        )
        for number, kind in enumerate(kinds)
    ]
