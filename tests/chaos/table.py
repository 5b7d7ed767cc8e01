"""The drills' table."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import cpu_name, versions
from megatron_aquila.verify.page import markdown
from tests.chaos.drill import Outcome
from tests.chaos.faults import KINDS

HEADER = (
    "fault",
    "torchrun",
    "forked",
    "recovered",
    "refused as it should",
    "samples lost beyond the last checkpoint",
    "median seconds to recover",
)


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a class, and a row of them all."""
    rows = []
    for name, kind in KINDS.items():
        mine = [outcome for outcome in outcomes if outcome.fault.kind == name and outcome.fired]
        rows.append([kind.title, *cells(mine)])
    return markdown(HEADER, [*rows, ["all", *cells([outcome for outcome in outcomes if outcome.fired])]])


def cells(outcomes: Sequence[Outcome]) -> list[str]:
    """What became of them."""
    right = [outcome for outcome in outcomes if not outcome.wrong]
    seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    return [
        str(sum(outcome.launcher == "torchrun" for outcome in outcomes)),
        str(sum(outcome.launcher == "forked" for outcome in outcomes)),
        str(sum(outcome.recovered for outcome in right)),
        str(sum(outcome.refused for outcome in right)) if any(outcome.refused for outcome in outcomes) else "–",
        str(sum(outcome.lost for outcome in outcomes)),
        f"{statistics.median(seconds):.1f}" if seconds else "–",
    ]


def report(outcomes: Sequence[Outcome], *, command: str, seed: int, minutes: float, disk: str) -> str:
    """The table, and under which circumstances."""
    fired = [outcome for outcome in outcomes if outcome.fired]
    kinds, failed = {outcome.fault.kind for outcome in fired}, [outcome for outcome in outcomes if outcome.wrong]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("python", "torch"))
    about = (
        f"{len(fired)} injections of {len(kinds)} classes in {minutes:.0f} minutes, {len(failed)} not as they should. "
        f"`{command}`, seed {seed}; {cpu_name()}, {os.cpu_count()} cores, load {load} at the end; {found}; the full "
        f"disk is {disk}."
    )
    return f"{table(outcomes)}\n\n{about}"


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """What was not as it should be."""
    return [
        f"{outcome.fault} ({outcome.launcher}, {outcome.layout}): {problem}"
        for outcome in outcomes
        for problem in outcome.wrong
    ]


PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
