from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from megatron_aquila.kernels import products
from megatron_aquila.parallel import layers
from megatron_aquila.parallel.collectives import Pending
from megatron_aquila.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_aquila.parallel.placement import Placement
from tests.parallel.worlds import CPU, CountCollectives, distance, on_ranks, share, tp_group

S, B, H, F = 8, 3, 16, 32


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """x_SBH, column weight, row weight and the gradient of the output, equal on all ranks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, B, H), (F, H), (H, F), (S, B, H)]
    scales = [1, H**-0.5, F**-0.5, 1]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def make(
    layer: type,
    in_features: int,
    out_features: int,
    size: int,
    sp: bool,
    dtype: torch.dtype,
    overlap: bool = False,
):
    placement = Placement(tp=tp_group(size), sequence_parallel=sp, dtype=dtype, device=CPU, overlap=overlap)
    return layer(in_features, out_features, placement=placement)


def plain(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two linears with a tanh between them, in plain torch on one process, in float64 from the same numbers."""
    x, column, row, grad_y = (t.double() for t in tensors(dtype))
    leaves = [t.requires_grad_() for t in (x, column, row)]
    y = torch.tanh(x @ column.T) @ row.T
    return dict(zip(("y", "x", "column", "row"), (y.detach(), *torch.autograd.grad(y, leaves, grad_y)), strict=True))


def errors(size: int, sp: bool, dtype: torch.dtype) -> dict[str, float]:
    """Distance of this rank's output and gradients from the plain ones."""
    group = tp_group(size)
    x, column_weight, row_weight, grad_y = tensors(dtype)
    column, row = make(ColumnParallelLinear, H, F, size, sp, dtype), make(RowParallelLinear, F, H, size, sp, dtype)
    with torch.no_grad():
        column.weight.copy_(share(column_weight, group))
        row.weight.copy_(share(row_weight, group, dim=1))
    x = share(x, group) if sp else x.requires_grad_()
    y = row(torch.tanh(column(x)))
    y.backward(share(grad_y, group).detach() if sp else grad_y)
    ours = {"y": y.detach(), "x": x.grad, "column": column.weight.grad, "row": row.weight.grad}
    dims = {"y": 0 if sp else None, "x": 0 if sp else None, "column": 0, "row": 1}
    expected = {
        name: full if dims[name] is None else share(full, group, dims[name]).detach()
        for name, full in plain(dtype).items()
    }
    assert all(tensor is not None and tensor.dtype is dtype for tensor in ours.values())
    return {name: distance(ours[name], expected[name]) for name in ours}


# bfloat16: a value passes at most 8 roundings (three products, tanh twice, tp - 1 <= 3 sums), each half an eps; what a
# sum of 32 terms loses in float32 is nothing beside them. float32: the same, and the three sums at sqrt(32) roundings.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 16 * 2**-23, torch.bfloat16: 4 * 2**-7}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_plain_torch_with_gradients(pool, size: int, sp: bool, dtype: torch.dtype) -> None:
    for rank, error in enumerate(on_ranks(pool, size, errors, sp, dtype)):
        assert max(error.values()) <= TOLERANCES[dtype], f"rank {rank}: {error}"


MUTANTS = {
    "no all-reduce": (False, "all_reduce_", lambda x, group: x),
    "added tp times": (False, "all_reduce_", lambda x, group: layers_all_reduce(x, group).mul_(group.size)),
    "no sum over ranks": (True, "reduce_scatter", lambda x, group: x.chunk(group.size)[group.rank].contiguous()),
    "own tokens for all": (True, "all_gather", lambda x, group: torch.cat([x] * group.size)),
    "own tokens for the weight": (
        True,
        "begin_all_gather",
        lambda x, group, overlap: Pending(torch.cat([x] * group.size)),
    ),
    "no sum of the input's gradient": (False, "begin_all_reduce_", lambda x, group, overlap: Pending(x)),
    "no sum over ranks of the input's gradient": (
        True,
        "begin_reduce_scatter",
        lambda x, group, overlap: Pending(x.chunk(group.size)[group.rank].contiguous()),
    ),
}
layers_all_reduce = layers.all_reduce_


def mutant_errors(size: int, name: str) -> dict[str, float]:
    sp, function, wrong = MUTANTS[name]
    with mock.patch.object(layers, function, wrong):
        return errors(size, sp, torch.float64)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reduction_shows(pool, size: int, name: str) -> None:
    for error in on_ranks(pool, size, mutant_errors, name):
        assert max(error.values()) > 10 * max(TOLERANCES.values()), error


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_a_world_of_one_is_torch_linear_to_the_bit(layer: type, dtype: torch.dtype) -> None:
    ours = make(layer, H, F, 1, sp=True, dtype=dtype)
    torch.nn.init.normal_(ours.weight)
    x, grad_y = torch.randn(S, B, H, dtype=dtype, requires_grad=True), torch.randn(S, B, F, dtype=dtype)
    y, expected = ours(x), torch.nn.functional.linear(x, ours.weight)
    assert torch.equal(y, expected)
    grads, expected_grads = (torch.autograd.grad(out, (x, ours.weight), grad_y) for out in (y, expected))
    assert all(map(torch.equal, grads, expected_grads))
    assert torch.autograd.gradcheck(
        layers._ColumnParallel.apply,
        (
            torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
            ours.placement,
        ),
    )


def collectives_of(size: int, layer: type, sp: bool) -> tuple[Counter[str], Counter[str], int]:
    """What one forward and one backward send, and how many elements of activations are kept in between."""
    group, column = tp_group(size), layer is ColumnParallelLinear
    module = make(layer, H, F, size, sp, torch.float32)
    torch.nn.init.zeros_(module.weight)
    features, rows = (H, S // size if sp else S) if column else (H // size, S)
    x = torch.zeros(rows, B, features, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        CountCollectives() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
    ):
        y = module(x)
    with CountCollectives() as backward:
        y.backward(torch.zeros_like(y))
    assert group.size == size
    return forward.counts, backward.counts, sum(t.numel() for t in kept)


@pytest.mark.parametrize(
    ("layer", "sp", "forward", "backward", "kept"),
    [
        (ColumnParallelLinear, True, {"all_gather": 1}, {"all_gather": 1, "reduce_scatter": 1}, S // 2 * B * H),
        (ColumnParallelLinear, False, {}, {"all_reduce": 1}, S * B * H),
        (RowParallelLinear, True, {"reduce_scatter": 1}, {"all_gather": 1}, S * B * H // 2),
        (RowParallelLinear, False, {"all_reduce": 1}, {}, S * B * H // 2),
    ],
)
def test_what_is_sent_and_kept(pool, layer: type, sp: bool, forward, backward, kept: int) -> None:
    assert on_ranks(pool, 2, collectives_of, layer, sp) == [(forward, backward, kept)] * 2


def column_backward(size: int, sp: bool, overlap: bool, deferred: bool) -> tuple[list[torch.Tensor], list[str]]:
    """Gradients of input and weight, and in which order the backward began, multiplied and waited."""
    module = make(ColumnParallelLinear, H, F, size, sp, torch.float64, overlap)
    x, weight, _, _ = tensors(torch.float64)
    with torch.no_grad():
        module.weight.copy_(share(weight, tp_group(size)))
    x = share(x, tp_group(size)) if sp else x.requires_grad_()
    y = module(x)
    events: list[str] = []

    def logged(owner: object, name: str, event: str):
        real = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *args, **how: (events.append(event), real(*args, **how))[1])

    queue = module.placement.weight_grads
    with (
        logged(layers, "begin_all_gather", "gather"),
        logged(layers, "begin_reduce_scatter", "sum"),
        logged(layers, "begin_all_reduce_", "sum"),
        logged(products.NativeGradients, "grad_x", "product for x"),
        logged(products.NativeGradients, "grad_weight", "product for the weight"),
        logged(layers.Pending, "wait", "wait"),
        queue.deferring("W") if deferred else nullcontext(),
    ):
        y.backward(torch.ones_like(y))
    if deferred:
        queue.pay("W")
    return [x.grad, module.weight.grad], events


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("sp", [False, True])
def test_overlap_changes_no_bit_and_each_product_has_a_collective_beside_it(pool, sp: bool, deferred: bool) -> None:
    together = on_ranks(pool, 2, column_backward, sp, True, deferred)
    apart = on_ranks(pool, 2, column_backward, sp, False, deferred)
    for (ours, events), (expected, _) in zip(together, apart, strict=True):
        assert all(map(torch.equal, ours, expected))
        weight = [] if deferred else ["product for the weight"]
        gathered = ["gather"] if sp else []
        assert events == [*gathered, "product for x", "wait", "sum", *weight, "wait"]


def uneven(size: int) -> None:
    with pytest.raises(AssertionError, match="33 output features do not split over 2"):
        make(ColumnParallelLinear, H, 33, size, False, torch.float32)
    with pytest.raises(AssertionError, match="33 input features do not split over 2"):
        make(RowParallelLinear, 33, H, size, False, torch.float32)


def test_features_that_do_not_split_are_refused(pool) -> None:
    on_ranks(pool, 2, uneven)
