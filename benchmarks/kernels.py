"""``python -m benchmarks.kernels``: every kernel against its reference, plain and compiled, and liger-kernel."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

import torch
import torch._functorch.config
import tyro
from torch import Tensor

from benchmarks.block_cases import BLOCK_CASES
from benchmarks.case import Case, Cases, Kernel, Make, Size, Work
from benchmarks.common import GpuOptions, Record, Run, find_device, in_turns, options_of, result_file, spread
from benchmarks.liger import LIGER
from benchmarks.loss_cases import LOSS_CASES
from benchmarks.product_cases import PRODUCT_CASES
from benchmarks.shapes import MODELS, TINY_MODELS, model_config
from benchmarks.update_cases import UPDATE_CASES
from megatron_aquila.config.derive import derive
from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels
from megatron_aquila.kernels.self_check import Sizes

CASES: Cases = MappingProxyType({**BLOCK_CASES, **LOSS_CASES, **PRODUCT_CASES, **UPDATE_CASES})


@dataclass(frozen=True, kw_only=True)
class Options(GpuOptions):
    """Time, rate and largest error of every kernel, forward and backward."""

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the file of the results, whose last case may not be whole: that one is measured again."""
    models: tuple[str, ...] = ("7b", "34b")
    """Whose sizes: 7b, 34b."""
    seq_len: int = 4096
    """Tokens of a sample."""
    batch: int = 4
    """Samples."""
    ops: tuple[str, ...] = ()
    """Which cases; default all."""
    rounds: int = 20
    """Turns of each kernel."""
    calls: int = 5
    """Calls of a turn."""
    compiled: bool = True
    """Also the reference under torch.compile, and ours that are compiled."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "kernels", argv)
    device = find_device(options)
    if device is None:
        return 0
    out, free = result_file("kernels", options), ("resume", "out", "models", "ops")
    record = Record("kernels", settings=options, device=device, out=out, free=free)
    done = whole_cases(record) if options.resume else []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for model in TINY_MODELS if options.tiny else options.models:
        assert model in MODELS or model in TINY_MODELS, f"there is no model {model}"
        size = Size(derive(model_config(model), 1).shape, seq_len=options.seq_len, batch=options.batch)
        for op in options.ops or CASES:
            where = {"model": model, "op": op}
            if where in done:
                continue
            try:
                case = CASES[op](size, device, dtype)
                with torch._functorch.config.patch(donated_buffer=False):  # backward is timed again and again
                    measure(record, where, case, entrants(op, case, size, dtype, options), options)
            except torch.OutOfMemoryError as error:
                record.add("kernels", **where, name="all", error=str(error).splitlines()[0])
    return 0


def whole_cases(record: Record) -> list[dict[str, str]]:
    """The cases of the file that is there, all but the last, whose rows are left out."""
    record.go_on()
    rows = record.tables.pop("kernels", [])
    cases = [{"model": row["model"], "op": row["op"]} for row in rows]
    kept = [(row, case) for row, case in zip(rows, cases, strict=True) if case != cases[-1]]
    if kept:
        record.tables["kernels"] = [row for row, _ in kept]
    return [case for _, case in kept]


def entrants(
    name: str, case: Case, size: Size, dtype: torch.dtype, options: Options
) -> Iterator[tuple[str, Kernel | str]]:
    """Kernels by name, or why one cannot run here. The reference in plain torch comes first."""
    device = next(iter(case.inputs)).device
    yield "torch eager, the reference", case.reference
    if options.compiled:
        yield "torch.compile of it", torch.compile(case.reference, dynamic=False)
    shape, op = size.shape, case.op
    sizes = Sizes(
        hidden_size=shape.hidden_size,
        ffn_size=shape.ffn_size,
        head_dim=shape.head_dim,
        norm_order=shape.norm_order,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        seq_len=options.seq_len,
        **case.sizes,
    )

    def chosen(kernel: str) -> Make:
        return lambda: getattr(choose_kernels(device, dtype, forced={op: kernel}, sizes=sizes), op)

    ours = {
        one: chosen(one)
        for one, kernel in IMPLEMENTATIONS.get(op, {}).items()
        if kernel is not case.reference and (one != "compiled" or options.compiled)
    }
    others = {"liger-kernel": LIGER[name]} if name in LIGER else {}
    for one, make in {**ours, **case.kernels, **others}.items():
        try:
            yield one, make()
        except ConfigError as error:
            yield one, error.problems[0].why
        except (ImportError, AttributeError) as error:  # not installed, or another version
            yield one, f"it is not here: {error}"


def measure(
    record: Record,
    where: Mapping[str, str],
    case: Case,
    kernels: Iterator[tuple[str, Kernel | str]],
    options: Options,
) -> None:
    """A row for each kernel and direction; one that cannot run is a row with the reason."""
    fit: dict[str, Kernel] = {}
    for name, kernel in kernels:
        if isinstance(kernel, str):
            record.add("kernels", **where, name=name, error=kernel)
        else:
            fit[name] = kernel
    errors = errors_of(case, fit)
    for name in [name for name, error in errors.items() if isinstance(error, str)]:
        record.add("kernels", **where, name=name, error=errors[name])
        del fit[name]
    device = next(iter(case.inputs)).device
    for direction, work in directions(case).items():
        runs = {name: RUNS[direction](case, kernel) for name, kernel in fit.items()}
        times = in_turns(runs, device=device, warmup=3, rounds=options.rounds, count=options.calls)
        for name, seconds in times.items():
            row = spread(seconds)
            rate = work.amount / row["seconds"] / 1e12
            values = {"direction": direction, "rate": rate, "unit": work.unit, "largest_error": errors[name]}
            record.add("kernels", **where, name=name, **row, **values)


def directions(case: Case) -> dict[str, Work]:
    """What is timed, and the work in it."""
    works = {"forward": case.forward, "backward": case.backward, "both": case.both}
    return {direction: work for direction, work in works.items() if work is not None}


def errors_of(case: Case, kernels: Mapping[str, Kernel]) -> dict[str, float | str]:
    """How far each kernel is from the reference in float64, or why it does not run at all."""
    exact = outcome(case, case.reference, torch.float64) if case.exact is None else case.exact()
    found: dict[str, float | str] = {}
    for name, kernel in kernels.items():
        try:
            found[name] = largest_error(outcome(case, kernel), exact)
        except Exception as error:  # compilers and drivers raise anything
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return found


def leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The inputs as tensors of their own, in ``dtype`` or their own types."""
    own = (x.detach().to(x.dtype if dtype is None else dtype).clone() for x in case.inputs)
    return [x.requires_grad_(case.has_backward) for x in own]


def graph_of(case: Case, kernel: Kernel, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs, with gradients to ``inputs``, which stay whole: a kernel may write into what it is given."""
    with torch.set_grad_enabled(case.has_backward):
        return case.call(kernel, *(x.clone() if case.has_backward else x.detach().clone() for x in inputs))


def gradients_for(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same gradients of the outputs for every kernel: the case's, else random."""
    if case.gradients is not None:
        return [grad.to(y.dtype) for grad, y in zip(case.gradients, outputs, strict=True)]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]


def outcome(case: Case, kernel: Kernel, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and, where there is a backward, the inputs' gradients."""
    inputs = leaves(case, dtype)
    outputs = graph_of(case, kernel, inputs)
    found = [y.detach() for y in (outputs if case.compared is None else case.compared(*outputs))]
    if case.has_backward:
        found += torch.autograd.grad(outputs, inputs, gradients_for(case, outputs))
    return found


def largest_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference of any output or gradient, as a share of that tensor's largest value."""
    return max(
        float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(ours, exact, strict=True)
    )


def forward_of(case: Case, kernel: Kernel) -> Run:
    """A call without autograd, again and again on the same memory."""
    inputs = [x.detach() for x in leaves(case)]

    def run() -> None:
        with torch.no_grad():
            case.call(kernel, *inputs)

    return run


def backward_of(case: Case, kernel: Kernel) -> Run:
    """The backward of one call, again and again."""
    inputs = leaves(case)
    outputs = graph_of(case, kernel, inputs)
    grads = gradients_for(case, outputs)
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def both_of(case: Case, kernel: Kernel) -> Run:
    """A call and its backward, again and again."""
    inputs = leaves(case)

    def run() -> None:
        outputs = case.call(kernel, *inputs)
        torch.autograd.grad(outputs, inputs, gradients_for(case, outputs))

    return run


RUNS: Mapping[str, Callable[[Case, Kernel], Run]] = MappingProxyType(
    {"forward": forward_of, "backward": backward_of, "both": both_of}
)


if __name__ == "__main__":
    sys.exit(main())
