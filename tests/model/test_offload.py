"""Activations that wait on the host: the same bits, each storage once, and nothing that others hold."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_aquila.model.offload import HostActivations, Trip, Unit
from megatron_aquila.verify.pool import WorkerPool
from tests.model.test_recompute import CONFIG, Living, for_stages, one_rank, unequal

CPU = torch.device("cpu")
Kinds = dict[str, dict[str, Any]]


def with_offload(kinds: Kinds, *wanted: int) -> Kinds:
    """Each kind of recomputation, and none, with the activations of so many layers offloaded."""
    return {
        f"{name}, {number} offloaded": {**kind, "offload_activations": number}
        for name, kind in {"nothing": {}, **kinds}.items()
        for number in wanted
    }


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_no_bit_changes_on_one_rank(precision: Any) -> None:
    with one_rank():
        config = replace(CONFIG, train=replace(CONFIG.train, precision=precision))
        assert unequal(config, with_offload(for_stages(1), 3)) == []
        assert unequal(config, with_offload({}, 1, 2, 4)) == []


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "sequence": True}, {"pipeline": 2, "schedule": "zb-h1"}, {"pipeline": 2, "chunks": 2}],
    ids=str,
)
def test_no_bit_changes_in_a_world(layout: dict[str, Any], pool: Callable[[int], WorkerPool]) -> None:
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, **layout))
    kinds = with_offload({"full": {"recompute": "full"}}, 1, 2)
    assert pool(2).run(unequal, config, kinds) == [[]] * 2


def layers(count: int, size: int = 8) -> list[Unit]:
    """Layers that save their input, their weight, and three views of what is between."""
    weights = [nn.Parameter(torch.randn(size, 3 * size, dtype=torch.float64)) for _ in range(count)]

    def layer(weight: nn.Parameter) -> Unit:
        def run(x: Tensor) -> Tensor:
            a, b, c = (x @ weight).chunk(3, dim=-1)
            return x + a * b * c.sin()

        return run

    return [layer(weight) for weight in weights]


def run(host: HostActivations, units: list[Unit], x: Tensor, *shared: Tensor) -> Tensor:
    return host.run(units, x, shared)


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_gradients_are_those_of_layers_that_keep(wanted: int) -> None:
    units, x = layers(3), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(run(HostActivations(CPU, wanted=0), units, x).sum(), x)
    host = HostActivations(CPU, wanted=wanted)
    for _ in range(2):
        assert torch.equal(*torch.autograd.grad(run(host, units, x).sum(), x), *expected)
        found = host.num_bytes
    assert host.num_bytes == found, "buffers are used again"


def test_a_storage_travels_once_and_what_others_hold_does_not() -> None:
    """Of the layer: x @ weight, 3 x 32 numbers, of which a, b and c are views; a * b and sin(c), 32 each."""
    (unit,), x = layers(1), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(4, 8, dtype=torch.float64)
    host = HostActivations(CPU, wanted=1)
    y = run(host, [lambda x: unit(x) * shared], x, shared)
    assert host.num_bytes == 8 * (96 + 32 + 32), "neither the received x, nor the weight, nor what is shared"
    inner = HostActivations(CPU, wanted=2)
    run(inner, [lambda x: x * 2, unit], x)
    assert inner.num_bytes == 8 * (32 + 96 + 32 + 32), "an x from the layer before"
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


def test_numbers_that_are_not_values_stay() -> None:
    host, rows = HostActivations(CPU, wanted=1), torch.tensor([1, 0])
    x = torch.randn(2, 8, requires_grad=True)
    trip = Trip(host, stays=())
    weight = nn.Parameter(torch.ones(3))
    assert trip.pack(rows) is rows
    assert trip.pack(weight) is weight
    assert trip.pack(torch.empty(0)).numel() == 0
    assert trip.unpack(weight) is weight
    run(host, [lambda x: x[rows]], x).sum().backward()  # type: ignore[no-untyped-call]
    assert host.num_bytes == 0


def test_nothing_leaves_without_gradients() -> None:
    host = HostActivations(CPU, wanted=2)
    with torch.no_grad():
        run(host, layers(2), torch.randn(4, 8, dtype=torch.float64))
    assert host.num_bytes == 0


def test_memory_is_free_between_forward_and_backward_and_after() -> None:
    units, x = layers(4), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)

    def living(wanted: int) -> tuple[int, int]:
        host = HostActivations(CPU, wanted=wanted)
        with Living() as memory:
            y = run(host, units, x)
            found = [memory.num_bytes - host.num_bytes - y.nbytes]
            y.sum().backward()  # type: ignore[no-untyped-call]
            x.grad = None
            del y
            gc.collect()
            return found[0], memory.num_bytes - host.num_bytes

    layer = 8 * (32 + 96 + 32 + 32)
    whole, half, nothing = (living(wanted) for wanted in (0, 2, 4))
    assert whole[0] - half[0] == 2 * layer - 8 * 32, "but for the x that came in, which is not counted here"
    assert nothing[0] == 0
    assert half[1] == nothing[1] == 0, "the weights' gradients were there"


def test_a_saved_tensor_that_changes_on_its_way_is_refused() -> None:
    def careless(x: Tensor) -> Tensor:
        y = x * 2
        z = y.sin()
        y.detach().add_(1)
        return z

    with pytest.raises(AssertionError, match=r"saved tensors of \[\(2, 3\)\] were changed before they had left"):
        run(HostActivations(CPU, wanted=1), [careless], torch.randn(2, 3, requires_grad=True))


class Fails(torch.autograd.Function):
    """Has no backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("no backward")


def test_a_step_that_fails_gives_its_buffers_back() -> None:
    """Before its backward, in it, and in a forward after others; so the pool does not grow."""
    (first, second, third), x = layers(3), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    host = HostActivations(CPU, wanted=3)

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no forward")

    run(host, [first, second, third], x).sum().backward()  # type: ignore[no-untyped-call]
    found, expected = host.num_bytes, x.grad
    run(host, [first, second, third], x)
    for middle, why in ((lambda x: Fails.apply(second(x)), "no backward"), (fails, "no forward")):  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match=why):
            run(host, [first, middle, third], x).sum().backward()  # type: ignore[no-untyped-call]
        gc.collect()
        x.grad = None
        run(host, [first, second, third], x).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
        assert host.num_bytes == found
        assert len(host._free) == 3


def test_a_buffer_serves_whatever_fits() -> None:
    host = HostActivations(CPU, wanted=1)
    large, small = host.take(100), host.take(10)
    host.give(large)
    host.give(small)
    assert host.take(8) is small
    assert host.take(8) is large
    assert host.take(8) is not large
    assert host.num_bytes == 118
