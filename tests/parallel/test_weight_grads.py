"""Weight gradients owed by the parallel linears."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_aquila.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.weight_grads import MainGrad
from tests.parallel.test_layers import F, H, tensors
from tests.parallel.worlds import CPU, distance, tp_group


def two_linears() -> tuple[torch.nn.Sequential, torch.Tensor]:
    _, column_weight, row_weight, _ = tensors(torch.float32)
    placement = Placement(tp=tp_group(1), sequence_parallel=False, dtype=torch.float32, device=CPU)
    linears = (ColumnParallelLinear(H, F, placement=placement), RowParallelLinear(F, H, placement=placement))
    with torch.no_grad():
        for linear, weight in zip(linears, (column_weight, row_weight), strict=True):
            linear.weight.copy_(weight)
    return torch.nn.Sequential(linears[0], torch.nn.Tanh(), linears[1]), tensors(torch.float32)[0].requires_grad_()


def test_deferred_weight_gradients_are_the_same_bits_and_the_same_work() -> None:
    """Two backwards owed at once and paid in order; the hooks of the parameters run when they are paid."""
    net, x = two_linears()
    with FlopCounterMode(display=False) as whole:
        for scale in (1.0, 3.0):
            (net(x * scale)).square().sum().backward()
    expected = [x.grad, *(p.grad for p in net.parameters())]

    net, x = two_linears()
    queue = net[0].placement.weight_grads
    hooked: list[str] = []
    for name, param in net.named_parameters():
        param.register_post_accumulate_grad_hook(
            lambda p, name=name: hooked.append(name) if p.grad is not None else None
        )
    with FlopCounterMode(display=False) as input_part:
        for key, scale in enumerate((1.0, 3.0)):
            y = net(x * scale).square().sum()
            with queue.deferring(key):
                y.backward()
    assert all(p.grad is None for p in net.parameters())
    assert hooked == []
    assert queue.owed == [0, 1]
    with FlopCounterMode(display=False) as weight_part:
        queue.pay(0)
        queue.pay(1)
    assert queue.owed == []
    assert sorted(hooked) == ["0.weight", "0.weight", "2.weight", "2.weight"]
    for found, right in zip([x.grad, *(p.grad for p in net.parameters())], expected, strict=True):
        assert torch.equal(found, right)
    assert input_part.get_total_flops() == 2 * weight_part.get_total_flops()  # F and B, each as large as W
    assert input_part.get_total_flops() + weight_part.get_total_flops() == whole.get_total_flops()


def main_grads(net: torch.nn.Sequential, added: list[str]) -> dict[torch.nn.Parameter, MainGrad]:
    return {
        param: MainGrad(torch.zeros_like(param), lambda name=name: added.append(name))
        for name, param in net.named_parameters()
    }


@pytest.mark.parametrize("deferred", [False, True])
def test_products_add_themselves_to_the_sums(deferred: bool) -> None:
    """Nothing comes to autograd; owed or not, the bits are the same, and near those of autograd's way."""
    net, x = two_linears()
    for scale in (1.0, 3.0):
        (net(x * scale)).square().sum().backward()
    expected = {name: param.grad for name, param in net.named_parameters()}

    sums = []
    for defer in (False, deferred):
        net, x = two_linears()
        queue, added = net[0].placement.weight_grads, list[str]()
        mains = main_grads(net, added)
        queue.accumulate_into(mains)
        for key, scale in enumerate((1.0, 3.0)):
            with queue.deferring(key) if defer else nullcontext():
                net(x * scale).square().sum().backward()
            assert len(added) == (0 if defer else 2 * key + 2)
            if defer:
                queue.pay(key)
                added.clear()
        assert all(param.grad is None for param in net.parameters())
        sums.append({name: mains[param].total for name, param in net.named_parameters()})
    for name, total in sums[0].items():
        assert torch.equal(total, sums[1][name])
        assert not total.requires_grad
        # two products of 24 rows in float32, added in another order
        assert distance(total, expected[name]) <= 2 * 24 * 2**-24


def test_what_is_owed_is_paid_once() -> None:
    net, x = two_linears()
    queue = net[0].placement.weight_grads
    with queue.deferring("a"):
        net(x).sum().backward()
    with pytest.raises(AssertionError, match="a is owed already"), queue.deferring("a"):
        pass
    queue.pay("a")
    with pytest.raises(KeyError):
        queue.pay("a")
    net(x).sum().backward()  # closed again: nothing is deferred
    assert queue.owed == []


def test_a_weight_is_found_whatever_became_of_what_autograd_saved() -> None:
    """Hooks on saved tensors, as recomputation has, hand backward a copy of the weight: the sum is the parameter's."""
    net, x = two_linears()
    added: list[str] = []
    net[0].placement.weight_grads.accumulate_into(main_grads(net, added))
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        y = net(x).square().sum()
    y.backward()
    assert added == ["2.weight", "0.weight"]
    assert all(param.grad is None for param in net.parameters())
