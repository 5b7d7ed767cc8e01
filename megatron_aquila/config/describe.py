"""A run in words: what its settings come to, in lines that ``aquila config show`` and the start of a run print."""

from dataclasses import fields
from itertools import groupby

from megatron_aquila.config.cli import LoadedConfig
from megatron_aquila.config.derive import Derived, full_microbatches, memory_plan, traffic_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import all_settings, spell, value_of
from megatron_aquila.plan.flops import flops_per_token, num_params
from megatron_aquila.plan.memory import Memory
from megatron_aquila.plan.offload import HostMemory
from megatron_aquila.plan.stages import Bubble, idle_share
from megatron_aquila.plan.work import Order

GIB, MIB = 2**30, 2**20
RECORDED = "forward, backward and reduction of a step as one CUDA graph, once they are warm; the update apart"


def setting_rows(loaded: LoadedConfig, *, changed_only: bool = False) -> list[tuple[str, str, str]]:
    """``(name, value, source)`` of every setting, or of those that no longer have their default."""
    rows = []
    for name, setting in all_settings().items():
        value = value_of(loaded.config, name)
        if not changed_only or value != setting.default:
            rows.append((name, spell(value), loaded.sources[name]))
    return rows


def derived_rows(config: RunConfig, derived: Derived, order: Order, *, bubble: Bubble) -> list[tuple[str, str]]:
    """``(what, words)``: layout, sizes, FLOPs, batch, stages, bubble and memory that follow from the settings.

    ``bubble`` is what the pipeline's simulator says. ``order`` of the step's work is what its schedule says; the memory
    follows from it.
    """
    grid, shape = derived.grid, derived.shape
    tokens = config.train.train_samples * shape.seq_len
    batch, microbatches = config.train.global_batch, full_microbatches(derived)
    dealt = f"{microbatches} microbatches{_uneven(derived)}{_ramp(config)}"
    layout = f"{grid.world_size} = tp {grid.tp} x cp {grid.cp} x dp {grid.dp} x pp {grid.pp}"
    if grid.num_copies > 1:
        layout += f", ZeRO-{config.parallel.zero} in {grid.num_copies} groups of {grid.num_shards}"
    if grid.cp > 1:
        layout += f", {config.parallel.context_method} attention over cp"
    return [
        ("ranks", layout + (", sequence parallel" if config.parallel.sequence else "")),
        ("parameters", f"{num_params(shape):,} (and padding to {shape.padded_vocab_size:,} vocabulary rows)"),
        ("MLP width", f"{shape.ffn_size:,}"),
        ("FLOPs per token", _flops(derived)),
        ("step", f"{batch:,} samples = {batch * shape.seq_len:,} tokens in {dealt}"),
        ("run", f"{config.train.train_samples:,} samples = {tokens:,} tokens"),
        ("layers by stage", _stages(derived)),
        ("pipeline bubble", _bubble(config, derived, bubble)),
        *([("launches", RECORDED)] if config.train.cuda_graph else []),
        *memory_rows(config, derived, order),
    ]


def memory_rows(config: RunConfig, derived: Derived, order: Order) -> list[tuple[str, str]]:
    """Estimated memory, by purpose, a line for each pipeline rank and each size of micro-batch.

    One more for each pipeline rank whose host has some of it.
    """
    sizes, ranks = sorted(set(derived.batches.micro_batches), reverse=True), range(derived.stages.num_ranks)
    plans = {size: memory_plan(config, derived, order, micro_batch=size) for size in sizes}
    rows = [
        (
            f"memory, pp rank {rank}" + (f", {size} at once" if len(plans) > 1 else ""),
            memory_words(plan.of_rank(rank)),
        )
        for rank in ranks
        for size, plan in plans.items()
    ]
    if config.optim.offload_optimizer > 0 or config.train.offload_activations > 0:
        plan = plans[sizes[0]]
        rows += [(f"host memory, pp rank {rank}", memory_words(plan.host_of_rank(rank))) for rank in ranks]
    return rows


TRAFFIC_COLUMNS = ("what", "call", "between ranks", "calls", "of bytes", "sent")


def traffic_rows(config: RunConfig, derived: Derived, order: Order) -> tuple[int, list[tuple[str, ...]]]:
    """The pipeline rank that sends the most in a step at the full batch, and its rows under ``TRAFFIC_COLUMNS``.

    ``order`` of the step's work: what the pipeline's schedule says.
    """
    plan = traffic_plan(config, derived, order)
    by_rank = [plan.of_rank(pp_rank) for pp_rank in range(derived.grid.pp)]
    busiest = max(range(derived.grid.pp), key=lambda pp_rank: sum(row.sent_bytes for row in by_rank[pp_rank]))
    return busiest, [
        (
            row.what,
            row.kind,
            f"{row.group} {row.group_size}",
            f"{row.count:,}",
            _size(row.num_bytes),
            _size(row.sent_bytes) if row.sent_bytes else "-",
        )
        for row in by_rank[busiest]
    ]


def _flops(derived: Derived) -> str:
    causal, full = flops_per_token(derived.shape), flops_per_token(derived.shape, "full")
    return f"{causal / 1e9:.5g} G with causal attention ({full / 1e9:.5g} G with full attention)"


def _uneven(derived: Derived) -> str:
    """`` of 2 samples on dp ranks 0-7, 1 on 8-23`` where the replicas' micro-batches differ."""
    sizes, words = derived.batches.micro_batches, list[str]()
    for size, run in groupby(range(len(sizes)), key=sizes.__getitem__):
        first, *more = run
        unit, ranks = ("", "on") if words else (" samples", "on dp ranks")
        words.append(f"{size}{unit} {ranks} {first}" + (f"-{more[-1]}" if more else ""))
    return f" of {', '.join(words)}" if len(words) > 1 else ""


def _ramp(config: RunConfig) -> str:
    if config.train.rampup_batch is None:
        return ""
    start, increment, samples = config.train.rampup_batch
    return f", growing from {start} by {increment} over the first {samples:,} samples"


def _stages(derived: Derived) -> str:
    """``7 7 8 8 8 8 8 6; by rank 7+8 7+8 8+8 8+6; ranks wait 4.6 % for the heaviest``."""
    stages = derived.stages
    counts = [len(layers) for layers in stages.layers]
    by_rank = ["+".join(str(counts[stage]) for stage in stages.stages_of(rank)) for rank in range(stages.num_ranks)]
    parts = [spell(counts)]
    if stages.chunks > 1:
        parts.append(f"by rank {spell(by_rank)}")
    if stages.num_ranks > 1:
        parts.append(f"ranks wait {100 * idle_share(derived.shape, stages):.1f} % for the heaviest")
    return "; ".join(parts)


def _bubble(config: RunConfig, derived: Derived, bubble: Bubble) -> str:
    stages, microbatches = derived.stages, full_microbatches(derived)
    name = config.parallel.schedule + (f" in {stages.chunks} chunks a rank" if stages.chunks > 1 else "")
    equal = f" ({100 * bubble.equal:.2f} % if all stages were equal)" if stages.num_ranks > 1 else ""
    return f"{100 * bubble.own:.2f} % of a step{equal}, {name} with {microbatches} microbatches"


def memory_words(memory: Memory | HostMemory) -> str:
    """The total and every part that is not zero, e.g. ``26.4 GiB: weights 4.1 GiB, ...``."""
    parts = [(part.name.replace("_", " "), getattr(memory, part.name)) for part in fields(memory)]
    named = ", ".join(f"{name} {_size(size)}" for name, size in parts if size)
    return f"{_size(memory.total)}: {named}"


def _size(size: int) -> str:
    """Bytes in words: ``26.4 GiB``, ``61 MiB``, or ``32 B``."""
    if size < MIB:
        return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
