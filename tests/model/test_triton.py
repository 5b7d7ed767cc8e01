"""The model on our Triton kernels, interpreted on a CPU: q, k, v, logits in place, a sum and its norm in one pass."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, Kernels, choose_kernels
from megatron_aquila.plan.recompute import MODULES
from megatron_aquila.verify.pool import WorkerPool
from tests.model.test_recompute import CONFIG, WIDE, gradients, kept_of_two_layers, one_rank, unequal

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[kernels]'")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, and the model is on the CPU")

OPS = ("rms_norm", "add_rms_norm", "rope_qkv", "swiglu", "softmax_statistics", "softmax_gradient")
SMALL = replace(
    CONFIG,
    model=replace(CONFIG.model, num_layers=2, seq_len=4),
    train=replace(CONFIG.train, global_batch=2, train_samples=2, precision="fp32"),
)


def triton_kernels(dtype: torch.dtype, calls: Counter[str] | None = None) -> Kernels:
    """Ours for a CPU, but ``OPS`` by Triton, counted in ``calls``."""

    def counting(op: str) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            if calls is not None:
                calls[op] += 1
            return IMPLEMENTATIONS[op]["triton"](*args, **settings)

        return call

    return replace(choose_kernels(torch.device("cpu"), dtype), **{op: counting(op) for op in OPS})  # type: ignore[arg-type]


@contextmanager
def on_triton(calls: Counter[str] | None = None) -> Iterator[None]:
    """Machines built inside run on ``triton_kernels``."""

    def choose(device: torch.device, dtype: torch.dtype, **_: Any) -> Kernels:
        return triton_kernels(dtype, calls)

    with mock.patch("megatron_aquila.train.build.choose_kernels", choose):
        yield


def by_triton(config: RunConfig) -> dict[str, Tensor]:
    """``gradients`` on Triton kernels. Runs in a worker."""
    with on_triton():
        return gradients(config)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())


# Float32 roundings of sums over 61 columns and 16 rows, through two layers.
BOUND = 64 * torch.finfo(torch.float32).eps


def test_every_op_of_the_model_runs_and_gives_the_gradients_of_our_own() -> None:
    calls: Counter[str] = Counter()
    with one_rank():
        expected = gradients(SMALL)
        with on_triton(calls):
            found = gradients(SMALL)
    of_blocks = {"rms_norm": 2 * 3, "add_rms_norm": 2 * 2, "rope_qkv": 2 * 2, "swiglu": 2 * 2}
    assert calls == of_blocks | {"softmax_statistics": 2, "softmax_gradient": 2}
    assert 0 < largest_error(found, expected) < BOUND, "another kernel has other roundings, and no more"


def test_what_8_bit_products_give_is_turned_in_place() -> None:
    """Another kernel's last bit of a bfloat16 tips roundings to 8 bits, so that only what is far off can show."""
    config = replace(SMALL, model=replace(SMALL.model, seq_len=16), train=replace(SMALL.train, precision="fp8"))
    with one_rank():
        expected = gradients(config)
        with on_triton():
            found = gradients(config)
    ours, own = (torch.cat([value.double().flatten() for value in grads.values()]) for grads in (found, expected))
    assert (ours - own).norm() < 0.2 * own.norm()


def test_recomputing_changes_no_bit() -> None:
    """In bfloat16, where a sum of gradients that is rounded once is not one that is rounded twice."""
    kinds = {
        "all modules": {"recompute": "selective", "recompute_modules": MODULES},
        "both layers": {"recompute": "full", "recompute_layers": 2},
    }
    with one_rank(), on_triton():
        assert unequal(replace(SMALL, train=replace(SMALL.train, precision="bf16")), kinds) == []


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2, "schedule": "zb-h1"}], ids=str)
def test_in_a_world(layout: dict[str, Any], pool: Callable[[int], WorkerPool]) -> None:
    config = replace(SMALL, parallel=replace(SMALL.parallel, **layout))
    found, expected = pool(2).run(by_triton, config), pool(2).run(gradients, config)
    assert max(map(largest_error, found, expected)) < BOUND


@pytest.mark.parametrize("settings", [{"kind": "none"}, {"kind": "selective", "modules": MODULES}])
def test_what_is_kept_is_what_the_plan_says(settings: dict[str, Any]) -> None:
    """The memory of q, k and v is the projection's own, and no byte more is kept."""
    shape, kernels = replace(WIDE, seq_len=2), triton_kernels(torch.float32)
    # the interpreter has cycles that hold the tensors of its last launch
    measured, planned = kept_of_two_layers(shape, kernels, "fp32", collect=gc.collect, **settings)
    assert measured == planned
