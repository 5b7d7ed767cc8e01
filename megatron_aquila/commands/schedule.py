"""``aquila schedule``: what a pipeline schedule costs and how it looks, on paper."""

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import load_config, with_config_flag
from megatron_aquila.config.derive import derive
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.pipeline.action import Op
from megatron_aquila.pipeline.checks import check
from megatron_aquila.pipeline.draw import LEGEND, draw, draw_to_scale, is_drawable, num_blocks, scale
from megatron_aquila.pipeline.schedules import build_schedule, default_chunks
from megatron_aquila.pipeline.simulate import Timeline, simulate, stage_costs
from megatron_aquila.pipeline.svg import Panel, svg
from megatron_aquila.plan.stages import ScheduleName, of_mean, rank_flops, stage_flops

NAMES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "zb-h1", "zb-v")
USAGE = """Simulate pipeline schedules: bubble, activations held, and the picture.

  aquila schedule --pp 4 --microbatches 32 --schedule 1f1b --chunks 5
  aquila schedule --pp 4 --microbatches 32 --compare --svg all.svg
  aquila schedule CONFIG.yaml --world-size 64 --compare

The last takes ranks, microbatches and stages, weighed by their FLOPs, from a run;
flags of its settings may follow as for training: --pp 8 --global-batch 2048.

Times are in any unit: those of one microbatch on one rank, all its chunks together."""
HEADER = f"{'schedule':<12}{'chunks':>6}{'makespan':>10}{'bubble':>10}{'in span':>10}   peak activations per rank"
MOST_BLOCKS = 6  # of a picture with every name
MOST_ACTIONS = 1_000_000  # some ten seconds


def _shown(metavar: str) -> Any:
    """How --help shows an option: defaults stand in the words where there is one."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def _optional(read: Callable[[str], Any], metavar: str, choices: tuple[str, ...] | None = None) -> Any:
    """How an option is read that may be left out: given as the word None, which tyro would offer, it may not be."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


_COUNT = _optional(int, "N")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The command line."""

    config: Annotated[str | None, _shown("FILE")] = None
    """Run to take ranks, microbatches, schedule and stages from; --config may be left out."""
    preset: Annotated[str | None, _shown("NAME")] = None
    """Preset to take them from."""
    world_size: Annotated[int | None, _COUNT, _shown("N")] = None
    """Processes of that run; default the fewest that its layout fits."""
    pp: Annotated[int | None, _COUNT, _shown("N")] = None
    """Pipeline ranks."""
    microbatches: Annotated[int | None, _COUNT, _shown("N")] = None
    """Microbatches of a step; default those of the run's full batch."""
    schedule: Annotated[ScheduleName | None, _optional(str, "NAME", NAMES), _shown("NAME")] = None
    """gpipe, 1f1b, or zb-h1 and zb-v, which split the backward in two. Default the run's, or 1f1b."""
    chunks: Annotated[int | None, _COUNT, _shown("N")] = None
    """Stages on each rank; 1f1b with several is the interleaved one. Default 1, with zb-v 2."""
    forward: Annotated[float, _shown("TIME")] = 1.0
    """Time of the forward; default 1, as of the next two."""
    backward: Annotated[float, _shown("TIME")] = 1.0
    """Time of the backward for the input gradient."""
    weight: Annotated[float, _shown("TIME")] = 1.0
    """Time of the backward for the weight gradients."""
    hop: Annotated[float, _shown("TIME")] = 0.0
    """Time of one message between ranks; default 0."""
    stage_times: Annotated[tuple[float, ...], _shown("X X ...")] = ()
    """How much each stage takes of the times, 1 where all are even: a number a stage, or a number a rank."""
    compare: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """All schedules side by side at one scale; --chunks is that of the interleaved one, by default 2."""
    svg: Annotated[Path | None, _shown("FILE")] = None
    """File to draw the picture into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One schedule to simulate. ``times`` are those of all chunks of a rank whose share is 1."""

    name: ScheduleName
    pp: int
    microbatches: int
    chunks: int
    times: Mapping[Op, float]
    hop: float
    shares: tuple[float, ...]

    def __str__(self) -> str:
        return self.name if self.chunks == 1 else f"{self.name}, {self.chunks} chunks a rank"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    words = with_config_flag(sys.argv[1:] if argv is None else argv)
    with exit_code() as code:
        options, rest = tyro.cli(
            ScheduleOptions,
            args=words,
            prog="aquila schedule",
            description=USAGE,
            config=(tyro.conf.FlagCreatePairsOff,),
            return_unknown_args=True,
        )
        if rest and options.config is None and options.preset is None:
            why = "is no option of this command"
            way_out = "settings of a run need one: name it first, CONFIG.yaml or --preset NAME; or see --help"
            raise ConfigError(
                [Problem(word, "", why, way_out) for word in rest if word.startswith("--")]
                or [Problem(rest[0], "", "belongs to no option", "see --help")]
            )
        run(options, rest, width=shutil.get_terminal_size((120, 24)).columns)
    return code.value


def run(options: ScheduleOptions, settings: Sequence[str] = (), *, width: int) -> None:
    """Print the table, and the picture ``width`` characters wide. ``settings`` are flags for the run.

    Raises ConfigError for settings that cannot be, ScheduleError for chunks that the schedule does not have.
    """
    refuse(wrong_numbers(options))
    about = ""
    if options.config is not None or options.preset is not None:
        options, about = with_run(options, settings)
    refuse(wrong_sizes(options))
    timelines = [(case, timed(case)) for case in cases(options)]
    times = f"F {options.forward:g}, B {options.backward:g}, W {options.weight:g}, hop {options.hop:g}"
    heading = f"{options.pp} ranks, {options.microbatches} microbatches, {times}"
    if options.svg is not None:
        write(options.svg, svg([panel(case, timeline) for case, timeline in timelines], heading))
    print(f"{about}{heading}\n{HEADER}")
    for case, timeline in timelines:
        print(table_row(case, timeline))
    print("bubble: all ranks' waiting until all are done; in span: within its own, of the rank that waits most")
    print("activations: in microbatches of one rank, all its chunks together")
    print(f"\n{picture(timelines, width)}")
    if options.svg is not None:
        print(f"\ndrawn in {options.svg}")


def refuse(problems: Sequence[Problem]) -> None:
    """Raise ConfigError if there are any."""
    if problems:
        raise ConfigError(problems)


def wrong_numbers(options: ScheduleOptions) -> list[Problem]:
    """Numbers that cannot be, whatever the others are."""
    problems = []
    for flag in ("pp", "microbatches", "chunks", "world_size"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            problems.append(Problem(spelled(flag), value, "there is nothing to run", "use 1 or more"))
    for flag in ("forward", "backward", "weight"):
        value = getattr(options, flag)
        if not 0 < value < math.inf:
            problems.append(Problem(spelled(flag), value, "work takes time", "use a number above 0"))
    if not 0 <= options.hop < math.inf:
        problems.append(Problem("--hop", options.hop, "no message arrives before it is sent", "use 0 or more"))
    return problems


def with_run(options: ScheduleOptions, settings: Sequence[str]) -> tuple[ScheduleOptions, str]:
    """``options`` completed from the run they name, and a few words about it.

    The stages' times follow from their FLOPs, head included. Raises ConfigError for settings that cannot run.
    """
    given: dict[str, object] = {"--config": options.config, "--preset": options.preset, "--pp": options.pp}
    if not options.compare:
        given |= {"--schedule": options.schedule, "--chunks": options.chunks}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    config = load_config([*flags, *settings], world_size=options.world_size, prog="aquila schedule").config
    derived = derive(config, options.world_size)
    grid, (batch, microbatches) = derived.grid, derived.batch_at(config.train.train_samples)
    flops = rank_flops if options.compare else stage_flops
    shares = of_mean(flops(derived.shape, derived.stages))
    name: ScheduleName = config.parallel.schedule if options.schedule is None else options.schedule
    chunks = options.chunks if options.compare else derived.stages.chunks
    microbatches = microbatches if options.microbatches is None else options.microbatches
    sizes = " or ".join(str(size) for size in sorted(set(derived.batches.micro_batches)))
    about = (
        f"tp {grid.tp} x pp {grid.pp} x dp {grid.dp}, global batch {batch}, micro-batch {sizes}; "
        f"layers by stage {' '.join(str(len(layers)) for layers in derived.stages.layers)}\n"
    )
    if not options.stage_times:
        what = "ranks" if options.compare or chunks == 1 else "stages"
        about += f"times of the {what}, by FLOPs with the head: {' '.join(f'{share:.3f}' for share in shares)}\n"
        options = replace(options, stage_times=shares)
    return replace(options, pp=grid.pp, microbatches=microbatches, schedule=name, chunks=chunks), about


def wrong_sizes(options: ScheduleOptions) -> list[Problem]:
    """Sizes that are missing or do not go together."""
    problems = []
    for flag in ("pp", "microbatches"):
        if getattr(options, flag) is None:
            way_out = f"give {spelled(flag)} N, or a run to take it from: CONFIG.yaml or --preset NAME"
            problems.append(Problem(spelled(flag), "", "is not given", way_out))
    if options.pp is None or options.microbatches is None:
        return problems
    chunks = 2 if options.compare else default_chunks(options.schedule or "1f1b")
    chunks = chunks if options.chunks is None else options.chunks
    most = MOST_ACTIONS // (3 * options.pp * chunks)
    if options.microbatches > most:
        why = f"with {options.pp * chunks} stages that is more than this simulates"
        way_out = f"use {most} or less" if most else "use fewer ranks or chunks"
        problems.append(Problem("--microbatches", options.microbatches, why, way_out))
    shares, stages = options.stage_times, options.pp * chunks
    fitting = {options.pp} if options.compare else {options.pp, stages}
    if shares and (len(shares) not in fitting or not all(0 < share < math.inf for share in shares)):
        why = f"it takes one number above 0 a rank{'' if options.compare else ' or a stage'}"
        way_out = f"give {' or '.join(map(str, sorted(fitting)))}"
        problems.append(Problem("--stage-times", " ".join(f"{share:g}" for share in shares), why, way_out))
    return problems


def spelled(field: str) -> str:
    """The flag of an option."""
    return "--" + field.replace("_", "-")


def cases(options: ScheduleOptions) -> list[Case]:
    """The schedule asked for; to compare, every schedule in its usual form and the interleaved one."""
    assert options.pp is not None, "pp was checked to be given"
    assert options.microbatches is not None, "microbatches were checked to be given"
    name: ScheduleName = options.schedule or "1f1b"
    wanted = [(name, default_chunks(name) if options.chunks is None else options.chunks)]
    if options.compare:
        wanted = [(each, default_chunks(each)) for each in NAMES]
        interleaved = options.chunks if options.chunks is not None and options.chunks > 1 else 2
        wanted.insert(2, ("1f1b", interleaved))
    forward, backward, weight = options.forward, options.backward, options.weight
    return [
        Case(
            name=each,
            pp=options.pp,
            microbatches=options.microbatches,
            chunks=chunks,
            times={Op.F: forward, Op.B: backward + weight, Op.I: backward, Op.W: weight},
            hop=options.hop,
            shares=options.stage_times or (1.0,) * options.pp,
        )
        for each, chunks in wanted
    ]


def timed(case: Case) -> Timeline:
    """The schedule, proved to run where links hold all that is sent, and then simulated."""
    stages = case.pp * case.chunks
    schedule = build_schedule(case.name, case.pp, case.microbatches, case.chunks)
    check(schedule, stages, case.microbatches, link_depth=case.microbatches * case.chunks)
    rank_of = {action.stage: rank for rank, program in schedule.items() for action in program}
    by_stage = len(case.shares) == stages
    share = [case.shares[stage if by_stage else rank_of[stage]] for stage in range(stages)]

    return simulate(schedule, stage_costs(case.times, share, chunks=case.chunks), case.hop)


def table_row(case: Case, timeline: Timeline) -> str:
    """One line of the table under ``HEADER``."""
    peaks = " ".join(f"{timeline.peak_microbatches(rank):g}" for rank in timeline.schedule)
    numbers = f"{timeline.makespan:>10.6g}{100 * timeline.bubble:>8.2f} %{100 * abs(timeline.span_bubble):>8.2f} %"
    return f"{case.name:<12}{case.chunks:>6}{numbers}   {peaks}"


def picture(timelines: Sequence[tuple[Case, Timeline]], width: int) -> str:
    """One schedule with every action's name, or several to scale; of what is too long for that, how to see it."""
    drawn = [timeline for _, timeline in timelines]
    if len(drawn) == 1 and num_blocks(drawn[0], width) <= MOST_BLOCKS:
        return draw(drawn[0], width)
    column = scale(drawn, width)
    shown = [(case, timeline) for case, timeline in timelines if len(drawn) > 1 and is_drawable(timeline, column)]
    parts = [f"{case}\n{draw_to_scale(timeline, column)}" for case, timeline in shown]
    if shown:
        parts.insert(0, f"a character is {column:.4g} of time, {LEGEND}")
    if left := [str(case) for case, _ in timelines if case not in [case for case, _ in shown]]:
        parts.append(f"too long for this width: {'; '.join(left)}. --svg FILE draws it")
    return "\n\n".join(parts)


def panel(case: Case, timeline: Timeline) -> Panel:
    """The schedule's part of the SVG."""
    in_span = f"{100 * abs(timeline.span_bubble):.2f} % in span"
    note = f"makespan {timeline.makespan:.6g}, bubble {100 * timeline.bubble:.2f} %, {in_span}"
    return Panel(timeline=timeline, title=str(case), note=note)


def write(path: Path, text: str) -> None:
    """Write the picture; raises ConfigError where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        why = str(error.strerror).lower()
        raise ConfigError([Problem("--svg", path, why, "name a file in a folder that can be written")]) from error
