"""``aquila schedule``: what a pipeline schedule costs and how it looks, on paper."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.checks import check, needed_link_depth
from megatron_aquila.pipeline.draw import draw
from megatron_aquila.pipeline.schedules import build_schedule, default_chunks
from megatron_aquila.pipeline.simulate import Timeline, simulate
from megatron_aquila.pipeline.svg import svg

Name = Literal["gpipe", "1f1b", "zb-h1", "zb-v"]
NAMES: tuple[Name, ...] = get_args(Name)
HEADER = f"{'schedule':<12}{'chunks':>6}{'makespan':>10}{'bubble':>10}{'in span':>10}   peak activations per rank"


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Simulate a pipeline schedule: bubble, activations held, and the picture as text.

    Times are in any unit: those of one microbatch on one rank, all its chunks together.
    """

    pp: int
    """Pipeline ranks."""
    microbatches: int
    """Microbatches of a step."""
    schedule: Name = "1f1b"
    """Order of the work; zb-h1 and zb-v split the backward in two."""
    chunks: int | None = None
    """Stages on each rank; 1f1b with several is the interleaved one. Default 1, with zb-v 2."""
    forward: float = 1.0
    """Time of the forward."""
    backward: float = 1.0
    """Time of the backward for the input gradient."""
    weight: float = 1.0
    """Time of the backward for the weight gradients."""
    hop: float = 0.0
    """Time of one message between ranks."""
    stage_times: tuple[float, ...] = ()
    """How much each stage takes of the times, 1 where all are even: a number a stage, or a number a rank."""
    svg: Path | None = None
    """File to draw the picture into."""
    compare: bool = False
    """All schedules side by side, without the picture as text; --chunks is that of the interleaved one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(ScheduleOptions, args=argv, prog="aquila schedule", description=ScheduleOptions.__doc__)
    with exit_code() as code:
        run(options, width=shutil.get_terminal_size((120, 24)).columns)
    return code.value


def run(options: ScheduleOptions, *, width: int) -> None:
    """Print the table, and the picture ``width`` characters wide.

    Raises ConfigError for settings that cannot be, ScheduleError for chunks that the schedule does not have.
    """
    problems = list(wrong(options))
    if problems:
        raise ConfigError(problems)
    rows = [table_row(one, timed(one)) for one in (side_by_side(options) if options.compare else [options])]
    timeline = timed(options)
    times = f"F {options.forward:g}, B {options.backward:g}, W {options.weight:g}, hop {options.hop:g}"
    print(f"{options.pp} ranks, {options.microbatches} microbatches, {times}")
    print("\n".join([HEADER, *rows]))
    print("bubble: waiting until all are done; in span: between a rank's own first and last action")
    print("activations: in microbatches of one rank, all its chunks together")
    if not options.compare:
        print(f"\n{draw(timeline, width)}")
    if options.svg is not None:
        options.svg.write_text(svg(timeline, title(options)), encoding="utf-8")
        print(f"\ndrawn in {options.svg}")


def wrong(options: ScheduleOptions) -> list[Problem]:
    """What is wrong with the settings."""
    problems = []
    for name in ("pp", "microbatches", "chunks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(Problem(f"--{name}", value, "there is nothing to run", "use 1 or more"))
    for name in ("forward", "backward", "weight"):
        if getattr(options, name) <= 0:
            problems.append(Problem(f"--{name}", getattr(options, name), "work takes time", "use more than 0"))
    if options.hop < 0:
        problems.append(Problem("--hop", options.hop, "no message arrives before it is sent", "use 0 or more"))
    if options.svg is not None and not options.svg.absolute().parent.is_dir():
        problems.append(Problem("--svg", options.svg, "its folder does not exist", "make the folder first"))
    shares, stages = options.stage_times, options.pp * chunks_of(options)
    if shares and (len(shares) not in ({options.pp} if options.compare else {options.pp, stages}) or min(shares) <= 0):
        way_out = f"give {options.pp}" + ("" if stages == options.pp or options.compare else f" or {stages}")
        why = f"it takes one number above 0 a rank{'' if options.compare else ' or a stage'}"
        problems.append(Problem("--stage-times", " ".join(f"{share:g}" for share in shares), why, way_out))
    return problems


def chunks_of(options: ScheduleOptions) -> int:
    """Stages a rank."""
    return default_chunks(options.schedule) if options.chunks is None else options.chunks


def side_by_side(options: ScheduleOptions) -> list[ScheduleOptions]:
    """Every schedule in its usual form, and the interleaved one."""
    interleaved = options.chunks if options.chunks is not None and options.chunks > 1 else 2
    rows = [replace(options, schedule=name, chunks=None) for name in NAMES]
    rows.insert(2, replace(options, schedule="1f1b", chunks=interleaved))
    return rows


def timed(options: ScheduleOptions) -> Timeline:
    """The schedule that the options name, proved to run and then simulated."""
    chunks = chunks_of(options)
    stages = options.pp * chunks
    schedule = build_schedule(options.schedule, options.pp, options.microbatches, options.chunks)
    check(schedule, stages, options.microbatches, link_depth=needed_link_depth(schedule, stages))
    rank_of = {action.stage: rank for rank, program in schedule.items() for action in program}
    shares = options.stage_times or (1.0,) * options.pp
    share = shares if len(shares) == stages else [shares[rank_of[stage]] for stage in range(stages)]
    times = {
        Op.F: options.forward,
        Op.B: options.backward + options.weight,
        Op.I: options.backward,
        Op.W: options.weight,
    }

    def cost(action: Action) -> float:
        return times[action.op] * share[action.stage] / chunks

    return simulate(schedule, cost, options.hop)


def table_row(options: ScheduleOptions, timeline: Timeline) -> str:
    """One line of the table under ``HEADER``."""
    chunks = chunks_of(options)
    peaks = " ".join(f"{timeline.peak_in_flight(rank) / chunks:g}" for rank in timeline.schedule)
    numbers = f"{timeline.makespan:>10.6g}{100 * timeline.bubble:>8.2f} %{100 * abs(timeline.span_bubble):>8.2f} %"
    return f"{options.schedule:<12}{chunks:>6}{numbers}   {peaks}"


def title(options: ScheduleOptions) -> str:
    """What the picture shows."""
    chunks = chunks_of(options)
    each = "" if chunks == 1 else f", {chunks} chunks a rank"
    return f"{options.schedule}{each}: {options.pp} ranks, {options.microbatches} microbatches"
