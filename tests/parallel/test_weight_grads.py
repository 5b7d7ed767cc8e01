"""Weight gradients owed by the parallel linears."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_aquila.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_aquila.parallel.placement import Placement
from tests.parallel.test_layers import F, H, tensors
from tests.parallel.worlds import CPU, tp_group


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
