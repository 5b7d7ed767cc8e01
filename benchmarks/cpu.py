"""``python -m benchmarks.cpu``: the training step on a CPU against transformers, what each op costs beside its
arithmetic, and what every layout says in a step."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import RESULTS, Record, Run, in_turns, options_of, spread
from benchmarks.contestants import OurStep, llama, transformers_step
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive, full_microbatches, traffic_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.rope import apply_rope, rope_tables
from megatron_aquila.model.block import Block
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.flops import flops_per_token
from megatron_aquila.plan.traffic import Traffic
from megatron_aquila.verify.dry import Call, CallRecorder, StorageTracker, dry_batch, dry_machine, dry_step, fake_world

CPU = torch.device("cpu")
CLOCKS: Mapping[str, Callable[[], float]] = MappingProxyType({"wall": time.perf_counter, "cpu": time.process_time})

MODEL = (
    "--num-layers 4 --hidden-size 256 --num-heads 4 --vocab-size 4096 --seq-len 256 --micro-batch 4 --global-batch 8"
)
TINY = "--num-layers 1 --hidden-size 16 --num-heads 2 --vocab-size 64 --seq-len 8 --micro-batch 1 --global-batch 2"

MATMUL, SIZE, CALLS = "torch.mm of 512", 512, 10
CALL_FLOPS = CALLS * 2 * SIZE**3

WORLD = 8
LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "dp 8": "",
        "dp 8, bf16 gradients": "--grad-reduce bf16",
        "dp 8, deterministic": "--deterministic-reduce",
        "tp 2": "--tp 2",
        "tp 2, sequence": "--tp 2 --sp",
        "tp 2, sequence, all logits": "--tp 2 --sp --loss-chunk-tokens 0",
        "tp 2, sequence, recompute full": "--tp 2 --sp --recompute full",
        "tp 4, sequence": "--tp 4 --sp",
        "pp 2": "--pp 2",
        "pp 2, 2 chunks": "--pp 2 --chunks 2",
        "pp 2, zb-v": "--pp 2 --schedule zb-v",
        "pp 4": "--pp 4",
        "tp 2, pp 2, sequence": "--tp 2 --pp 2 --sp",
    }
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The training step on a CPU against transformers, overheads of ops, and the communication of every layout."""

    out: Path | None = None
    """File of the results; default benchmarks/results/cpu.json."""
    threads: int = 2
    """Threads of torch."""
    rounds: int = 10
    """Turns that each contestant gets."""
    steps: int = 3
    """Steps of a turn."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: seconds of this process alone; for one thread on a machine that others use."""
    compiled: bool = True
    """Also measure transformers under torch.compile, which takes a minute to compile."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A model so small that the figures mean nothing: none are written unless --out says where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "cpu", argv)
    torch.set_num_threads(options.threads)
    out = options.out if options.out is not None or options.tiny else RESULTS / "cpu.json"
    record = Record("cpu", settings=options, device=CPU, out=out)
    measure_traffic(record)
    measure_ops(record, options)
    measure_steps(record, options)
    return 0


def measure_steps(record: Record, options: Options) -> None:
    """A row for each contestant: seconds of a step, tokens a second, share of the rate of a large matmul."""
    config = load_config([*(TINY if options.tiny else MODEL).split(), "--precision", "fp32"]).config
    runs: dict[str, Run] = {
        "megatron_aquila": OurStep(config, CPU),
        "transformers": _transformers(config, is_compiled=False),
    }
    if options.compiled:
        runs["transformers, compiled"] = _transformers(config, is_compiled=True)
    runs[MATMUL] = matmul()
    clock = CLOCKS[options.clock]
    times = in_turns(runs, device=CPU, warmup=2, rounds=options.rounds, count=options.steps, clock=clock)
    gemm = CALL_FLOPS / spread(times[MATMUL])["seconds"]
    shape, tokens = derive(config, 1).shape, config.train.global_batch * config.model.seq_len
    for name, seconds in times.items():
        row = spread(seconds)
        flops = CALL_FLOPS if name == MATMUL else tokens * flops_per_token(shape)
        rate = None if name == MATMUL else tokens / row["seconds"]
        record.add("step", name=name, **row, tokens_per_second=rate, gemm_share=flops / row["seconds"] / gemm)


def matmul() -> Run:
    """Large products one after the other: the rate that a step's FLOPs are held against."""
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    return repeated(lambda: left @ right, CALLS)


def _transformers(config: RunConfig, *, is_compiled: bool) -> Run:
    return transformers_step(config, CPU, weights="same", is_compiled=is_compiled, checkpointing=False)


def measure_ops(record: Record, options: Options) -> None:
    """Microseconds of forward and backward on tensors so small that only the overhead is left, and of torch's own."""
    calls = 3 if options.tiny else 100
    for name, (ours, theirs) in op_pairs().items():
        pair = {"ours": repeated(ours, calls), "theirs": repeated(theirs, calls)}
        times = in_turns(pair, device=CPU, warmup=1, rounds=options.rounds, clock=CLOCKS[options.clock])
        micros = {who: spread(seconds)["seconds"] / calls * 1e6 for who, seconds in times.items()}
        record.add("ops", name=name, ours_us=micros["ours"], theirs_us=micros["theirs"])


def repeated(run: Run, calls: int) -> Run:
    """``calls`` calls as one: a clock cannot see a single one."""

    def loop() -> None:
        for _ in range(calls):
            run()

    return loop


def op_pairs() -> dict[str, tuple[Run, Run]]:
    """Ours, and the plain torch or transformers code that computes the same: forward and backward of one token."""
    config = load_config(TINY.split()).config
    shape = derive(config, 1).shape
    heads, width, hidden = shape.num_heads, shape.head_dim, shape.hidden_size
    kernels = choose_kernels(CPU, torch.float32)
    placement = Placement(tp=ParallelContext.single().tp, sequence_parallel=False, dtype=torch.float32, device=CPU)
    column = ColumnParallelLinear(hidden, hidden, placement=placement)
    row = RowParallelLinear(hidden, hidden, placement=placement)
    block, layer = Block(shape, placement=placement, kernels=kernels), llama(shape, torch.float32, CPU).model.layers[0]
    for param in (*column.parameters(), *row.parameters(), *block.parameters()):
        torch.nn.init.normal_(param)
    x, weight = torch.randn(1, 1, hidden, requires_grad=True), torch.ones(hidden, requires_grad=True)
    matrix = torch.randn(hidden, hidden, requires_grad=True)
    gate_up = torch.randn(1, 1, 2 * hidden, requires_grad=True)
    q_SBND = torch.randn(1, 1, heads, width, requires_grad=True)
    cos, sin = rope_tables(torch.zeros(1, 1, dtype=torch.int64), head_dim=width, base=1e4, dtype=torch.float32)
    attend = F.scaled_dot_product_attention

    def plain_rope(x_SBND: Tensor) -> Tensor:
        first, second = x_SBND.chunk(2, dim=-1)
        return x_SBND * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)

    def plain_attention(q_SBND: Tensor) -> Tensor:
        q = q_SBND.permute(1, 2, 0, 3)
        return attend(q, q, q, is_causal=True).permute(2, 0, 1, 3)

    def plain_swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def both(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Tensor) -> tuple[Run, Run]:
        return forward_backward(ours, *args), forward_backward(theirs, *args)

    return {
        "column-parallel linear": both(column, lambda x: F.linear(x, matrix), x),
        "row-parallel linear": both(row, lambda x: F.linear(x, matrix), x),
        "rms_norm": both(
            lambda x, w: kernels.rms_norm(x, w, eps=1e-5, order="aquila"),
            lambda x, w: F.rms_norm(x, (hidden,), w, 1e-5),
            x,
            weight,
        ),
        "apply_rope": both(lambda q: apply_rope(q, cos, sin), plain_rope, q_SBND),
        "swiglu": both(kernels.swiglu, plain_swiglu, gate_up),
        "attention": both(lambda q: kernels.attention(q, q, q), plain_attention, q_SBND),
        "a whole layer": both(
            lambda x: block(x, cos, sin, None),
            lambda x: layer(x, position_embeddings=(cos.transpose(0, 1), sin.transpose(0, 1))),
            x,
        ),
    }


def forward_backward(fn: Callable[..., Any], *args: Tensor) -> Run:
    """``fn(*args)`` and the backward of what it returns; gradients are forgotten."""

    def run() -> None:
        out = fn(*args)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.ones_like(out))
        for arg in args:
            arg.grad = None

    return run


def measure_traffic(record: Record) -> None:
    """A row a layout of 8 ranks: collectives and bytes of a step on the rank that sends the most, planned and counted.

    A step is taken on fake ranks, and its calls are counted: an assertion where they are not what was planned.
    """
    for name, flags in LAYOUTS.items():
        config = layout_config(flags)
        plan = traffic_plan(config, derive(config, WORLD))
        pp_rank = max(range(plan.grid.pp), key=lambda pp: sum(row.sent_bytes for row in plan.of_rank(pp)))
        planned, counted = plan.of_rank(pp_rank), counted_calls(config, plan.grid.rank(pp=pp_rank))
        calls, num_bytes = sum(row.count for row in planned), sum(row.num_bytes for row in planned)
        found = len(counted), sum(call.num_bytes for call in counted)
        assert found == (calls, num_bytes), f"{name}: planned {calls} calls of {num_bytes} bytes, counted {found}"
        sent = sum(row.sent_bytes for row in planned)
        record.add("traffic", layout=name, **by_kind(planned), calls=calls, num_bytes=num_bytes, sent_bytes=sent)


def layout_config(flags: str) -> RunConfig:
    """The model on a layout, in bf16; every layout trains the same 32 samples a step."""
    words = [*MODEL.split(), "--micro-batch", "1", "--global-batch", "32", *flags.split()]
    return load_config(words, world_size=WORLD).config


def counted_calls(config: RunConfig, rank: int) -> list[Call]:
    """What one rank says in one step."""
    with fake_world(rank, WORLD), StorageTracker(), CallRecorder() as recorder:
        machine = dry_machine(config, WORLD)
        micro_batch, count = config.train.micro_batch, full_microbatches(machine.derived)
        dry_step(machine, [dry_batch(machine.derived.shape, micro_batch) for _ in range(count)])
    calls: list[Call] = recorder.calls
    return calls


def by_kind(rows: Sequence[Traffic]) -> dict[str, int]:
    """Calls by kind; sends and receives together are messages."""
    counts = dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "messages"), 0)
    for row in rows:
        kind = "messages" if row.kind in ("send", "receive") else row.kind.replace("-", "_")
        counts[kind] += row.count
    return counts


if __name__ == "__main__":
    sys.exit(main())
