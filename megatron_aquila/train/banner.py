"""The first lines of a run: what differs from the defaults, what is planned, which kernels run and why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from megatron_aquila.config.cli import LoadedConfig
from megatron_aquila.config.derive import Derived, memory_plan
from megatron_aquila.config.describe import GIB, derived_rows, memory_words, setting_rows
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.native import INDEX_BUILDER
from megatron_aquila.errors import AquilaError, ConfigError, Problem
from megatron_aquila.observe.log import Log
from megatron_aquila.plan.flops import peak_flops
from megatron_aquila.train.bubble import run_bubble, run_schedule
from megatron_aquila.train.env import machine_memory
from megatron_aquila.train.launcher import Launch


def print_banner(log: Log, loaded: LoadedConfig, derived: Derived) -> None:
    """Print the settings that differ from the defaults, grid, stages, batch, bubble and memory.

    Known before anything is built, as the kernels are not.
    """
    changed = setting_rows(loaded, changed_only=True)
    log.section("settings that differ from the defaults", {name: f"{value}  ({why})" for name, value, why in changed})
    order = run_schedule(loaded.config, derived)
    log.section("what follows", dict(derived_rows(loaded.config, derived, order, bubble=run_bubble(derived, order))))
    if loaded.config.checkpoint.save is None:
        log.line("no --save folder is set: nothing of this run will be kept")


def print_kernels(log: Log, config: RunConfig, chosen: Mapping[str, str]) -> None:
    """Print which kernels run. ``chosen``: those that were tried and chosen from, and why."""
    log.section("kernels", {**chosen, **set_kernels(config), "sample indices": INDEX_BUILDER})


def set_kernels(config: RunConfig) -> dict[str, str]:
    """How the settings, not a choice among kernels, have the loss, linears, gradients and their norm computed."""
    chunk = config.train.loss_chunk_tokens
    chunks = "as many tokens as 1 GiB holds" if chunk is None else f"{chunk} tokens"
    whole = "all logits, kept from forward to backward  (--loss-chunk-tokens 0)"
    is_fp8, is_fused = config.train.precision == "fp8", config.parallel.fuse_main_grads
    where = "in the product" if not is_fp8 else "in a pass of their own, the 8-bit product has no sum from outside"
    apart = "rounded, then added by autograd  (--no-fuse-main-grads)"
    return {
        "linear_cross_entropy": whole if chunk == 0 else f"in one with its projection, logits of {chunks} at once",
        "weight_gradient": f"added to the sums {where}" if is_fused else apart,
        "products": "fp8 in the blocks, head and attention in bf16" if is_fp8 else config.train.precision,
        "grad_norm": "one read of the gradients, which the update multiplies",
    }


def check_memory(config: RunConfig, derived: Derived, device: torch.device, launch: Launch) -> None:
    """Raise ``ConfigError`` where the plan needs more than there is, before it is allocated.

    A GPU must hold its rank's plan; a machine that computes on its CPU, those of all its processes. Each rank asks for
    itself: stages, micro-batches and devices may differ.
    """
    has_gpu, first = device.type == "cuda", launch.rank - launch.local_rank
    ranks = [launch.rank] if has_gpu else range(first, first + launch.local_world_size)
    total = torch.cuda.get_device_properties(device).total_memory if has_gpu else machine_memory()
    places = [derived.grid.coords(rank) for rank in ranks]
    alike = Counter((place["pp"], derived.batches.micro_batch_of(place["dp"])) for place in places)
    order = run_schedule(config, derived)

    def needs(pp_rank: int, micro_batch: int) -> tuple[int, str]:
        plan = memory_plan(config, derived, order, micro_batch=micro_batch)
        memory = plan.of_rank(pp_rank)
        beside = 0 if has_gpu else replace(plan, pinned=False).host_of_rank(pp_rank).total
        return memory.total + beside, memory_words(memory)

    found = {place: needs(*place) for place in alike}
    needed = sum(count * found[place][0] for place, count in alike.items())
    if needed <= total:
        return
    _, fullest = max(found.values())
    told = fullest if len(ranks) == 1 else f"{needed / GIB:.1f} GiB for {len(ranks)} processes, the fullest {fullest}"
    why = f"the plan needs more than {'the GPU' if has_gpu else 'this machine'}'s {total / GIB:.1f} GiB: {told}"
    flag, value = ("--tp", config.parallel.tensor) if has_gpu else ("--device", "cpu")
    error = ConfigError([Problem(flag, value, why, ways_to_save(config, has_gpu=has_gpu))])
    error.is_shared = len(ranks) == launch.world_size
    raise error


def check_graph(config: RunConfig, device: torch.device) -> None:
    """Raise ``ConfigError`` where steps are to be recorded and the device that was chosen is no GPU."""
    if config.train.cuda_graph and device.type != "cuda":
        raise ConfigError([Problem("--cuda-graph", "", "no GPU is here", "leave it out")])


def check_peak(config: RunConfig, device: torch.device) -> None:
    """Raise ``ConfigError`` where ``--peak-tflops`` is more than the dense peak that is known of the GPU."""
    given, precision = config.observe.peak_tflops, config.train.precision
    if device.type != "cuda" or given is None:
        return
    name = torch.cuda.get_device_name(device)
    dense = peak_flops(name, precision)
    if dense is None or given * 1e12 <= dense:
        return
    why = f"the dense peak of {name} in {precision} is {dense / 1e12:g}"
    if given * 1e12 > 1.9 * dense:
        why += "; twice that is with sparsity, which no training uses"
    raise ConfigError([Problem("--peak-tflops", given, why, f"leave it out, or use at most {dense / 1e12:g}")])


@contextmanager
def explain_out_of_memory(config: RunConfig, derived: Derived) -> Iterator[None]:
    """Turn the GPU's out-of-memory error into what was planned and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        memory = memory_plan(config, derived, run_schedule(config, derived)).peak()
        raise AquilaError(
            f"out of GPU memory; planned for the fullest rank were {memory_words(memory)}; {ways_to_save(config)}. "
            f"The allocator said: {error}"
        ) from error


def ways_to_save(config: RunConfig, *, has_gpu: bool = True) -> str:
    """What lowers the memory of a rank, nearest first; without a GPU, that of all processes of a machine.

    There nothing can leave its memory, and to cut the model for more of its processes moves no byte out of it.
    """
    ways = []
    if config.train.micro_batch_per_dp:
        ways.append("lower this replica's number in --micro-batch-per-dp")
    elif config.train.micro_batch > 1:
        ways.append(f"lower --micro-batch (now {config.train.micro_batch})")
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        ways.append("turn on --sp")
    if config.train.recompute == "none":
        ways.append("turn on --recompute selective, or full")
    elif config.train.recompute == "selective":
        ways.append("use --recompute full")
    ways += narrower_states(config)
    if has_gpu and config.train.offload_activations == 0:
        ways.append("use --offload-activations")
    if has_gpu and config.optim.offload_optimizer < 1:
        ways.append("use --offload-optimizer 1")
    if config.parallel.zero < 3:
        ways.append(f"raise --zero (now {config.parallel.zero}) where there are several replicas")
    if config.parallel.zero_group is not None:
        ways.append(f"raise --zero-group (now {config.parallel.zero_group}), or leave it out")
    if not has_gpu:
        return ", ".join([*ways, "use fewer processes on this machine, or more machines, or a smaller model"])
    ways += [f"raise --tp (now {config.parallel.tensor})", f"raise --pp (now {config.parallel.pipeline})"]
    return ", ".join([*ways, "or use more data-parallel ranks: optimizer states are sharded over them"])


def narrower_states(config: RunConfig) -> list[str]:
    """Which settings keep optimizer states in fewer bytes, where these can be."""
    optim = config.optim
    if config.train.precision not in ("bf16", "fp8") or optim.optimizer != "adamw":
        return []
    now = {"--master-weights remainder": optim.master_weights, "--moments-dtype bf16": optim.moments_dtype}
    return [f"use {flag}" for flag, value in now.items() if value == "fp32"]
