"""``aquila doctor``: why does the run not go on?"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.observe.breadcrumbs import FOLDER, stack_name
from megatron_aquila.observe.diagnosis import diagnose
from megatron_aquila.observe.processes import State, process_state
from megatron_aquila.observe.trails import RankTrail, age, read_trails
from megatron_aquila.observe.watch import DUMP_SIGNAL, last_stack

USAGE = """usage: aquila doctor hang RUN    which rank holds the others up and where it is, while the run hangs or after

RUN is the folder of --save, or of --log-dir where that is given. Exit status 1 where a rank is named, 0 where none is.
Ask on the machine of the rank in question: only there can its process be looked at and asked for its stack."""
SECONDS_FOR_A_STACK = 2.0
SHOWN_FRAMES = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aquila doctor``; returns its exit status."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["--help" | "-h"] | ["hang", "--help" | "-h"]:
            print(USAGE)
            return 0
        case ["hang", run] if not run.startswith("-"):
            with exit_code() as code:
                code.value = examine(Path(run))
            return code.value
    print(USAGE, file=sys.stderr)
    return 2


def examine(run: Path) -> int:
    """Print where the ranks of ``run`` stand and who is at fault, with its stack. Raises ``RunFolderError``."""
    trails = read_trails(run)
    host = os.uname().nodename[:64]
    states = {
        trail.rank: process_state(trail.pid, trail.start_ticks) if trail.host == host else None for trail in trails
    }
    print(summary(trails, states))
    findings = diagnose(trails, states)
    by_rank = {trail.rank: trail for trail in trails}
    for finding in findings:
        print(finding.text)
        for rank in finding.ranks:
            if rank in by_rank:
                print(indented(stack(run, by_rank[rank], states[rank])))
    if not findings:
        print("no rank holds the others up, as far as their breadcrumbs tell")
    return 1 if findings else 0


def summary(trails: Sequence[RankTrail], states: Mapping[int, State | None]) -> str:
    """Who is there, how they are, and how long ago any of them did anything."""
    latest = max(trails, key=lambda trail: trail.last)
    living = sum(state in ("runs", "stopped") for state in states.values())
    unknown = sum(state is None for state in states.values())
    where = f"{living} processes live here" + (f", {unknown} are on other machines" if unknown else "")
    steps = sorted({trail.step for trail in trails})
    between = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    if all(trail.has_ended for trail in trails):
        where += "; the run has ended in order"
    return (
        f"{len(trails)} of {trails[0].world} ranks in {between} ({latest.phase}); {where}; "
        f"the last sign of life is rank {latest.rank}'s, {age(latest.last)} ago"
    )


def stack(run: Path, trail: RankTrail, state: State | None) -> str:
    """The Python stack of a rank's main thread: asked for now if it can answer, else the last it wrote."""
    path = run / FOLDER / stack_name(trail.rank)
    known = path.stat().st_size if path.is_file() else 0
    if state == "runs":
        os.kill(trail.pid, DUMP_SIGNAL)
        deadline = time.monotonic() + SECONDS_FOR_A_STACK
        while time.monotonic() < deadline:
            time.sleep(0.05)
            text = _tail(path, known)
            if "(most recent call first)" in text and _tail(path, known) == text:
                return _first_lines(f"its stack now:\n{last_stack(text)}")
    written = last_stack(_tail(path, 0))
    if not written:
        return "it has written no stack" + (": it cannot run" if state == "stopped" else "")
    return _first_lines(f"the last stack it wrote:\n{written}")


def indented(text: str) -> str:
    """``text`` two columns to the right."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def _tail(path: Path, start: int) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(2**20).decode(errors="replace")


def _first_lines(text: str) -> str:
    lines = text.splitlines()
    left = len(lines) - SHOWN_FRAMES - 2
    return "\n".join(lines[: SHOWN_FRAMES + 2] + ([f"  ... {left} more"] if left > 0 else []))
