"""``python -m benchmarks.step``: whole training steps of the 7B and 34B shapes on one GPU, ours and transformers'."""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log2
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.common import Clock, GpuOptions, Record, Row, Run, find_device, result_file, seconds_of, spread
from benchmarks.contestants import OurStep, Weights, transformers_step
from benchmarks.loop import STEPS as LOOP_STEPS
from benchmarks.loop import loop_costs
from benchmarks.shapes import TINY_MODELS, model_config
from megatron_aquila.config.derive import derive, memory_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS
from megatron_aquila.plan.flops import flops_per_token, mfu, peak_flops
from megatron_aquila.train.banner import narrower_states
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.env import prepare_environment

Recompute = Literal["none", "selective", "full"]
Build = Callable[[], Run]
START_SECONDS = 30.0  # what a contestant takes to be built and compiled, as far as a plan goes
PLANNED_RATE = 500e12  # FLOP/s, likewise
FILLED = 0.95  # of a device's memory that a plan may take: allocator and libraries need the rest
MICROBATCH_TOKENS = 2**13  # of the cases that come first
NARROW = "bf16 moments, 16-bit remainders of the masters"  # 12 bytes a parameter, not 18


@dataclass(frozen=True, kw_only=True)
class Options(GpuOptions):
    """Training steps, ours and transformers' in turns, case after case as far as the time goes.

    Further flags are settings of our run: --kernels attention=sdpa --loss-chunk-tokens 0.
    """

    minutes: float = 25.0
    """No case is begun that would not be done by then; those left out are named in the results."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the file of the results: cases that it has are not measured again."""
    models: tuple[Literal["7b", "7b-8", "34b-8"], ...] = ("7b", "7b-8", "34b-8")
    """7b is whole, the others are slices of 8 layers."""
    seq_lens: tuple[int, ...] = (2048, 4096, 8192)
    """Tokens of a sample."""
    micro_batches: tuple[int, ...] = (4, 2, 1)
    """Samples computed at once."""
    recompute: tuple[Recompute, ...] = ("none", "selective")
    """What ours recomputes; transformers checkpoints its layers only where it runs out of memory otherwise."""
    microbatches: int = 4
    """Microbatches of a step."""
    rounds: int = 2
    """Turns of each contestant, which is built anew for each: two do not fit into memory."""
    steps: int = 10
    """Steps of a turn, after the warm-up."""
    warmup: int = 4
    """Steps of a turn that do not count. The fourth is where a step is recorded."""
    weights: tuple[Weights, ...] = ("same",)
    """transformers' weights and moments: same, all in bf16; masters, fp32 under autocast."""
    compiled: bool = True
    """transformers under torch.compile."""
    ours: tuple[Literal["chosen", "compiled", "recorded"], ...] = ("chosen", "compiled")
    """Ours: with the kernels that a run chooses; with those that torch.compile makes of the references; or, for small
    models and micro-batches, recorded (--cuda-graph)."""
    only_ours: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave transformers out."""
    loop: bool = True
    """Also the host's time, the update's and the log's, of our first contestant."""
    flags: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """The further flags, for the record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape of a step."""

    model: str
    seq_len: int
    micro_batch: int
    recompute: Recompute


@dataclass(frozen=True, slots=True)
class Way:
    """One way to take the step, and what it gives up to fit into memory."""

    build: Build
    config: RunConfig
    to_fit: str = ""


@dataclass(slots=True)
class Contestant:
    """Ways to take the step, the next one for where the one before runs out of memory, and what was measured.

    ``loop``: what the step costs beside its products, where ``wants_loop``.
    """

    ways: list[Way]
    wants_loop: bool = False
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: str = ""
    loop: Row = field(default_factory=dict)


@dataclass(slots=True)
class Budget:
    """The time of a benchmark: what a case takes is what was planned, times what the cases before took beside that."""

    minutes: float
    clock: Clock = time.monotonic
    began: float = field(init=False)
    planned: float = 0.0
    taken: float = 0.0

    def __post_init__(self) -> None:
        """The time begins."""
        self.began = self.clock()

    def has_time_for(self, planned: float) -> bool:
        """Whether a case would be done in time."""
        pace = self.taken / self.planned if self.planned > 0 else 1.0
        return self.clock() - self.began + pace * planned <= 60 * self.minutes

    def spent(self, planned: float, since: float) -> None:
        """A case was measured, which began at ``since``."""
        self.planned += planned
        self.taken += self.clock() - since


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    options, settings = tyro.cli(Options, args=words, prog="python -m benchmarks.step", return_unknown_args=True)
    options = replace(options, flags=tuple(settings))
    prepare_environment()
    device = find_device(options)
    if device is None:
        return 0
    kept = {"minutes", "resume", "out", "seq_lens", "models", "micro_batches", "recompute"}
    record = Record("step", settings=options, device=device, out=result_file("step", options), free=tuple(kept))
    if options.resume:
        record.go_on(without="left out")
    budget = Budget(options.minutes)
    for case in cases(options):
        if any(row.items() >= asdict(case).items() for row in record.tables.get("step", [])):
            continue
        config = case_config(case, options)
        planned = planned_seconds(config, options)
        if not options.tiny and not budget.has_time_for(planned):
            record.add("left out", **asdict(case), why="no time was left")
            continue
        began = budget.clock()
        for name, contestant in measured(contestants(config, options, device), options, device).items():
            record.add("step", **asdict(case), name=name, **result(contestant, config, device))
            if contestant.loop:
                record.add("loop", **asdict(case), name=name, **contestant.loop)
        budget.spent(planned, began)
    return 0


def cases(options: Options) -> list[Case]:
    """Those that say most first: nothing recomputed, the first model at every length, microbatches of 8,192 tokens."""
    models = tuple(TINY_MODELS) if options.tiny else options.models
    found = [
        Case(model=model, seq_len=seq_len, micro_batch=micro_batch, recompute=recompute)
        for recompute, model, seq_len, micro_batch in itertools.product(
            options.recompute, models, options.seq_lens, options.micro_batches
        )
    ]

    def rank(case: Case) -> tuple[int, float]:
        distance = abs(log2(case.micro_batch * case.seq_len / MICROBATCH_TOKENS))
        return options.recompute.index(case.recompute), distance

    return sorted(found, key=rank)


def case_config(case: Case, options: Options) -> RunConfig:
    """The settings of our run of a case."""
    sizes = {
        "--seq-len": case.seq_len,
        "--micro-batch": case.micro_batch,
        "--global-batch": case.micro_batch * options.microbatches,
        "--device": options.device,
        "--recompute": case.recompute,
    }
    return model_config(case.model, *(str(word) for pair in sizes.items() for word in pair), *options.flags)


def planned_seconds(config: RunConfig, options: Options) -> float:
    """What a case takes at an ordinary rate; only for leaving out what does not fit into the time."""
    num_contestants = len(options.ours) + (0 if options.only_ours else len(options.weights))
    step = config.train.global_batch * config.model.seq_len * flops_per_token(derive(config, 1).shape) / PLANNED_RATE
    turns = options.rounds * num_contestants * (START_SECONDS + (options.steps + options.warmup) * step)
    return turns + (LOOP_STEPS * step if options.loop else 0.0)


def contestants(config: RunConfig, options: Options, device: torch.device) -> dict[str, Contestant]:
    """Ours and transformers' in the ways asked for."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    found: dict[str, Contestant] = {}
    for ours in options.ours:
        name, run = OURS[ours]
        if ours == "recorded" and device.type != "cuda":
            continue
        found[name] = Contestant(our_ways(run(config), device, memory), wants_loop=options.loop and not found)
    if options.only_ours:
        return found

    def theirs(weights: Weights, *, checkpointing: bool) -> Build:
        return lambda: transformers_step(
            config, device, weights=weights, is_compiled=options.compiled, checkpointing=checkpointing
        )

    for weights in options.weights:
        name = "transformers" + ", fp32 weights" * (weights == "masters") + ", compiled" * options.compiled
        first, second = (theirs(weights, checkpointing=checkpointing) for checkpointing in (False, True))
        found[name] = Contestant([Way(first, config), Way(second, config, "gradient checkpointing")])
    return found


def with_compiled_kernels(config: RunConfig) -> RunConfig:
    """The run with torch.compile's kernels wherever there are any; those that the settings name stay."""
    named = {word.partition("=")[0] for word in config.train.kernels}
    made = (f"{op}=compiled" for op, kernels in IMPLEMENTATIONS.items() if "compiled" in kernels and op not in named)
    return replace(config, train=replace(config.train, kernels=(*config.train.kernels, *made)))


OURS: Mapping[str, tuple[str, Callable[[RunConfig], RunConfig]]] = MappingProxyType(
    {
        "chosen": ("megatron_aquila", lambda config: config),
        "compiled": ("megatron_aquila, compiled kernels", with_compiled_kernels),
        "recorded": (
            "megatron_aquila, CUDA graph",
            lambda config: replace(config, train=replace(config.train, cuda_graph=True)),
        ),
    }
)


def our_ways(config: RunConfig, device: torch.device, memory: int | None) -> list[Way]:
    """As set, and where the optimizer's states can be narrower, so; at once where else the plan exceeds ``memory``."""
    ways = [Way(lambda: OurStep(config, device), config)]
    narrow = replace(config, optim=replace(config.optim, master_weights="remainder", moments_dtype="bf16"))
    if narrower_states(config):
        ways.append(Way(lambda: OurStep(narrow, device), narrow, NARROW))
        if memory is not None and planned_bytes(config) > FILLED * memory:
            ways = ways[1:]
    return ways


def planned_bytes(config: RunConfig) -> int:
    """What our plan of the run takes at its widest moment."""
    derived = derive(config, 1)
    return memory_plan(config, derived, run_schedule(config, derived)).peak().total


def measured(found: dict[str, Contestant], options: Options, device: torch.device) -> dict[str, Contestant]:
    """The contestants with their seconds, taken in turns. Where memory runs out a way is given up."""
    for _ in range(options.rounds):
        for contestant in found.values():
            while contestant.ways and not turn(contestant, options, device):  # memory ran out
                contestant.ways.pop(0)
                contestant.seconds, contestant.peak_bytes = [], 0
    return found


def turn(contestant: Contestant, options: Options, device: torch.device) -> bool:
    """Build, warm up, measure and forget; False where memory runs out. What fails otherwise has no further way."""
    build = contestant.ways[0].build
    forget(device)
    step: Run | None = None
    try:
        step = build()
        seconds_of(step, device=device, count=options.warmup)
        contestant.seconds += seconds_of(step, device=device, count=options.steps)
    except torch.OutOfMemoryError as error:
        contestant.error = str(error).splitlines()[0]
        return False
    except Exception as error:  # compilers raise anything; the other cases go on
        contestant.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        contestant.ways.clear()
    else:
        if device.type == "cuda":
            contestant.peak_bytes = max(contestant.peak_bytes, torch.cuda.max_memory_allocated(device))
        if contestant.wants_loop and not contestant.loop and isinstance(step, OurStep):
            contestant.loop = loop_or_why(step, device)
    finally:
        step = None  # its tensors go with it
    return True


def loop_or_why(step: OurStep, device: torch.device) -> Row:
    """What ``loop_costs`` finds; memory that runs out there takes nothing from the step."""
    try:
        return loop_costs(step, device)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}


def forget(device: torch.device) -> None:
    """Free what the turn before held and start counting memory anew."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def result(contestant: Contestant, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Speed, MFU and memory of a contestant, or that its memory ran out."""
    if not contestant.ways:
        return {"error": contestant.error, "planned_gib": planned_bytes(config) / 2**30}
    way = contestant.ways[0]
    rate = config.train.global_batch * config.model.seq_len / statistics.median(contestant.seconds)
    flops = flops_per_token(derive(config, 1).shape)
    peak = peak_flops(torch.cuda.get_device_name(device), config.train.precision) if device.type == "cuda" else None
    share = "bf16_equivalent" if config.train.precision == "fp8" else "mfu"
    return {
        **spread(contestant.seconds),
        "to_fit": way.to_fit,
        "tokens_per_second": rate,
        "tflops": rate * flops / 1e12,
        share: None if peak is None else mfu(rate, flops, peak),
        "peak_gib": contestant.peak_bytes / 2**30,
        "planned_gib": planned_bytes(way.config) / 2**30,
    }


if __name__ == "__main__":
    sys.exit(main())
