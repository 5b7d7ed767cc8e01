"""``python -m benchmarks.step``: whole training steps of the 7B and 34B shapes on one GPU, ours and transformers'."""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.common import GpuOptions, Record, Run, find_device, result_file, seconds_of, spread
from benchmarks.contestants import Weights, our_step, transformers_step
from benchmarks.shapes import TINY_MODELS, model_config
from megatron_aquila.config.derive import derive, memory_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.flops import flops_per_token, mfu, peak_flops
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.env import prepare_environment

Recompute = Literal["none", "selective", "full"]
Build = Callable[[], Run]
START_SECONDS = 60.0  # what a contestant takes to be built and compiled, as far as a plan goes
PLANNED_RATE = 300e12  # FLOP/s, likewise


@dataclass(frozen=True, kw_only=True)
class Options(GpuOptions):
    """Training steps, ours and transformers' in turns, case after case as far as the time goes.

    Further flags are settings of our run: --kernels attention=sdpa --loss-chunk-tokens 0.
    """

    minutes: float = 25.0
    """No case is begun that would not be done by then; those left out are named in the results."""
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
    cuda_graph: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ours with --cuda-graph, too: for small models and micro-batches."""
    only_ours: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave transformers out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape of a step."""

    model: str
    seq_len: int
    micro_batch: int
    recompute: Recompute


@dataclass(slots=True)
class Contestant:
    """Ways to take the step, the next one for where the one before runs out of memory, and what was measured."""

    ways: list[tuple[str, Build]]
    seconds: list[float]
    peak_bytes: int = 0
    error: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    options, settings = tyro.cli(Options, args=words, prog="python -m benchmarks.step", return_unknown_args=True)
    prepare_environment()
    device = find_device(options)
    if device is None:
        return 0
    record = Record("step", settings=options, device=device, out=result_file("step", options))
    deadline = time.monotonic() + 60 * options.minutes
    for case in cases(options):
        config = case_config(case, options, settings)
        if not options.tiny and time.monotonic() + planned_seconds(config, options) > deadline:
            record.add("left out", **asdict(case), why="no time was left")
            continue
        for name, contestant in measured(contestants(config, options, device), options, device).items():
            record.add("step", **asdict(case), name=name, **result(contestant, config, device))
    return 0


def cases(options: Options) -> Iterator[Case]:
    """Those that say most first: all models at the first length, largest microbatch, nothing recomputed."""
    models = tuple(TINY_MODELS) if options.tiny else options.models
    for recompute, seq_len, micro_batch, model in itertools.product(
        options.recompute, options.seq_lens, options.micro_batches, models
    ):
        yield Case(model=model, seq_len=seq_len, micro_batch=micro_batch, recompute=recompute)


def case_config(case: Case, options: Options, settings: Sequence[str] = ()) -> RunConfig:
    """The settings of our run of a case."""
    sizes = {
        "--seq-len": case.seq_len,
        "--micro-batch": case.micro_batch,
        "--global-batch": case.micro_batch * options.microbatches,
        "--device": options.device,
        "--recompute": case.recompute,
    }
    return model_config(case.model, *(str(word) for pair in sizes.items() for word in pair), *settings)


def planned_seconds(config: RunConfig, options: Options) -> float:
    """What a case takes at an ordinary rate; only for leaving out what does not fit into the time."""
    num_contestants = 1 + options.cuda_graph + (0 if options.only_ours else len(options.weights))
    step = config.train.global_batch * config.model.seq_len * flops_per_token(derive(config, 1).shape) / PLANNED_RATE
    return options.rounds * num_contestants * (START_SECONDS + (options.steps + options.warmup) * step)


def contestants(config: RunConfig, options: Options, device: torch.device) -> dict[str, Contestant]:
    """Ours, and transformers' in the ways asked for."""
    found = {"megatron_aquila": Contestant([("", lambda: our_step(config, device))], [])}
    if options.cuda_graph and device.type == "cuda":
        recorded = replace(config, train=replace(config.train, cuda_graph=True))
        found["megatron_aquila, CUDA graph"] = Contestant([("", lambda: our_step(recorded, device))], [])
    if options.only_ours:
        return found

    def theirs(weights: Weights, *, checkpointing: bool) -> Build:
        return lambda: transformers_step(
            config, device, weights=weights, is_compiled=options.compiled, checkpointing=checkpointing
        )

    for weights in options.weights:
        name = "transformers" + ", fp32 weights" * (weights == "masters") + ", compiled" * options.compiled
        ways = [("", theirs(weights, checkpointing=False)), ("full", theirs(weights, checkpointing=True))]
        found[name] = Contestant(ways, [])
    return found


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
    _, build = contestant.ways[0]
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
    finally:
        step = None  # its tensors go with it
        if device.type == "cuda":
            contestant.peak_bytes = max(contestant.peak_bytes, torch.cuda.max_memory_allocated(device))
    return True


def forget(device: torch.device) -> None:
    """Free what the turn before held and start counting memory anew."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def result(contestant: Contestant, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Speed, MFU and memory of a contestant, or that its memory ran out."""
    derived = derive(config, 1)
    planned = memory_plan(config, derived, run_schedule(config, derived)).peak().total / 2**30
    if not contestant.ways:
        return {"error": contestant.error, "planned_gib": planned}
    rate = config.train.global_batch * config.model.seq_len / statistics.median(contestant.seconds)
    flops = flops_per_token(derived.shape)
    peak = peak_flops(torch.cuda.get_device_name(device), config.train.precision) if device.type == "cuda" else None
    share = "bf16_equivalent" if config.train.precision == "fp8" else "mfu"
    return {
        **spread(contestant.seconds),
        "checkpointing": contestant.ways[0][0],
        "tokens_per_second": rate,
        "tflops": rate * flops / 1e12,
        share: None if peak is None else mfu(rate, flops, peak),
        "peak_gib": contestant.peak_bytes / 2**30,
        "planned_gib": planned,
    }


if __name__ == "__main__":
    sys.exit(main())
