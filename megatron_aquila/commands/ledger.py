"""``aquila ledger``: what happened to a run, and whether every sample is in its last checkpoint once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.observe.ledger import Event, Ranges, read_ledger
from megatron_aquila.observe.lineage import LedgerReport, check_ledger


@dataclass(frozen=True, kw_only=True)
class LedgerOptions:
    """Print a run's ledger and check it. Exit status 1 where a sample is in the last checkpoint twice or never, where
    work is lost beyond a checkpoint, or where a start is from nowhere.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The --save folder of the run, or its --log-dir without one."""
    events: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print every event in full, a JSON object a line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aquila ledger``; returns its exit status."""
    options = tyro.cli(LedgerOptions, args=argv, prog="aquila ledger")
    with exit_code() as code:
        events = read_ledger(options.run)
        for event in events:
            print(json.dumps(event, ensure_ascii=False) if options.events else event_line(event))
        report = check_ledger(events)
        print(*report_lines(report), sep="\n")
        code.value = 0 if report.holds else 1
    return code.value


def event_line(event: Event) -> str:
    """An event in a line."""
    kind, time = event["event"], event["time"][:19].replace("T", " ")
    return f"{time}  {kind:<10}  {WORDS[kind](event) if kind in WORDS else _rest(event)}"


def report_lines(report: LedgerReport) -> list[str]:
    """The verdict, for people; wrong things last."""
    names = [saved.name for saved in report.lineage]
    shown = names if len(names) <= 6 else [*names[:2], f"... {len(names) - 4} more ...", *names[-2:]]
    counts = f"{report.starts} starts, {report.killed} ended without a stop, {report.rewinds} rewinds"
    lines = [f"{counts}, {report.fallbacks} fallbacks", f"lineage: {' > '.join(shown) or 'nothing was saved'}"]
    if report.lineage:
        lines.append(f"samples in {names[-1]}: {words(report.consumed)}; skipped: {words(report.skipped)}")
    lines.append(f"done and given up: {words(report.given_up)}")
    return [*lines, *(f"WRONG: {problem}" for problem in report.problems), *(["nothing is wrong"] * report.holds)]


def words(ranges: Ranges) -> str:
    """Ranges as ``--skip-samples`` takes them, both ends included."""
    return " ".join(f"{start}-{stop - 1}" for start, stop in ranges) or "none"


def _start(event: Event) -> str:
    found = event["checkpoint"]
    origin = "from the seed or published weights" if found is None else f"from {found['path']}, step {found['step']}"
    layout = " ".join(f"{name} {degree}" for name, degree in event["layout"].items())
    code = event["version"] if event["commit"] is None else f"{event['version']} ({event['commit']})"
    return f"{event['origin']}: {origin}, sample {event['samples']}; {event['world']} ranks = {layout}; version {code}"


def _saved(event: Event) -> str:
    parent = "" if event["parent"] is None else f", from {event['parent']}"
    return f"{event['name']} at sample {event['samples']}{parent}"


def _rewind(event: Event) -> str:
    skipped = words(tuple((start, stop) for start, stop in event["skipped"]))
    return f"at step {event['step']} back to {event['checkpoint']}, without samples {skipped}: {event['reason']}"


def _skip(event: Event) -> str:
    start, stop = event["samples"]
    return f"step {event['step']}, samples {words(((start, stop),))}: {event['reason']}"


def _stop(event: Event) -> str:
    return f"at step {event['step']}, sample {event['samples']}: {event['reason']}"


def _export(event: Event) -> str:
    return f"{event['checkpoint']} as published weights: {event['outcome']} after {event['seconds']} s"


def _rest(event: Event) -> str:
    return ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("event", "time"))


WORDS: Mapping[str, Any] = {
    "start": _start,
    "checkpoint": _saved,
    "rewind": _rewind,
    "skip": _skip,
    "export": _export,
    "stop": _stop,
}
