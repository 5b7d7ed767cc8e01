"""The first lines of a run: what it is, how it is split, what it should need, and why."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

import torch

from megatron_aquila.config.derive import Derived, memory_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import AquilaError, ConfigError, Problem
from megatron_aquila.observe.log import Log
from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import simulate
from megatron_aquila.plan.flops import flops_per_token, num_params
from megatron_aquila.plan.memory import Memory
from megatron_aquila.plan.stages import stage_flops

GIB = 2**30


def print_banner(
    log: Log, config: RunConfig, derived: Derived, sources: Mapping[str, str], kernels: Mapping[str, str]
) -> None:
    """Print settings that differ from the defaults, the grid, the stages, the kernels, planned memory and bubble."""
    log.section("settings that differ from the defaults", changed(config, sources))
    log.section("plan", plan_lines(config, derived))
    log.section("kernels", kernels)


def changed(config: RunConfig, sources: Mapping[str, str]) -> dict[str, str]:
    """Every setting that something set, with its value and where it came from."""
    lines = {}
    for name, source in sources.items():
        if source != "default":
            section, _, leaf = name.rpartition(".")
            value = getattr(getattr(config, section) if section else config, leaf)
            lines[name] = f"{value}  ({source})"
    return lines


def plan_lines(config: RunConfig, derived: Derived) -> dict[str, str]:
    """Model, grid, stages, batch, memory and bubble, a line each."""
    shape, grid = derived.shape, derived.grid
    batch, microbatches = derived.batch_at(config.train.train_samples)
    memory = memory_plan(config, derived).peak()
    layers = " ".join(str(len(stage)) for stage in derived.stages.layers)
    return {
        "model": f"{num_params(shape):,} parameters, {flops_per_token(shape) / 1e9:.4g} GFLOP a token (causal)",
        "grid": f"tp {grid.tp}{' with sp' if config.parallel.sequence else ''} x pp {grid.pp} x dp {grid.dp}"
        f" = {grid.world_size} ranks",
        "stages": f"{layers} layers; {config.parallel.schedule}, bubble {100 * bubble(config, derived):.1f} %",
        "batch": f"{batch} x {shape.seq_len} tokens: {microbatches} microbatches of {config.train.micro_batch} samples",
        "memory": f"{memory.total / GIB:.2f} GiB on the fullest rank ({memory_parts(memory)})",
    }


def memory_parts(memory: Memory) -> str:
    """The parts of an estimate that are not zero, largest first."""
    parts = {part.name: getattr(memory, part.name) for part in fields(memory)}
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in ordered if size > 0)


def bubble(config: RunConfig, derived: Derived) -> float:
    """Idle share of a full step, simulated with each stage's FLOPs; backward takes twice as long as forward."""
    _, microbatches = derived.batch_at(config.train.train_samples)
    schedule = build_schedule(config.parallel.schedule, derived.grid.pp, microbatches)
    flops = stage_flops(derived.shape, derived.stages)

    def cost(action: Action) -> float:
        return flops[action.stage] * (1 if action.op is Op.F else 2)

    return simulate(schedule, cost).bubble


def check_memory(config: RunConfig, derived: Derived, device: torch.device) -> None:
    """Raise ``ConfigError`` where the plan needs more than the whole device has, before anything is allocated."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    memory = memory_plan(config, derived).peak()
    if memory.total > total:
        why = f"the plan needs {memory.total / GIB:.1f} GiB a GPU ({memory_parts(memory)}), it has {total / GIB:.1f}"
        raise ConfigError([Problem("--tp", config.parallel.tensor, why, ways_to_save(config))])


@contextmanager
def explain_out_of_memory(config: RunConfig, derived: Derived) -> Iterator[None]:
    """Turn the GPU's out-of-memory error into what was planned and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        memory = memory_plan(config, derived).peak()
        raise AquilaError(
            f"out of GPU memory; planned were {memory.total / GIB:.1f} GiB on the fullest rank "
            f"({memory_parts(memory)}); {ways_to_save(config)}. The allocator said: {error}"
        ) from error


def ways_to_save(config: RunConfig) -> str:
    """Which settings lower the memory of a rank, nearest first."""
    ways = []
    if config.train.micro_batch > 1:
        ways.append(f"lower --micro-batch (now {config.train.micro_batch})")
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        ways.append("turn on --sp")
    ways += [f"raise --tp (now {config.parallel.tensor})", f"raise --pp (now {config.parallel.pipeline})"]
    return ", ".join([*ways, "or use more data-parallel ranks: optimizer states are sharded over them"])
