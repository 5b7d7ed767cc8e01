"""Linear layers whose weight is split over the tensor-parallel group.

Both are one autograd Function each, so that what is saved and what is communicated stands here and nowhere else: the
column layer saves its *sharded* input under sequence parallel and gathers it again in backward. The weight is kept as
it is: hooks on saved tensors, such as recomputation's, hand back another object, whose gradient goes nowhere.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.precision import apply
from megatron_aquila.parallel.collectives import (
    Pending,
    all_gather,
    all_reduce_,
    begin_all_gather,
    begin_all_reduce_,
    begin_reduce_scatter,
    reduce_scatter,
)
from megatron_aquila.parallel.placement import Placement


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, placement: Placement) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.placement = weight, placement
        x_SBH = all_gather(x, placement.tp) if placement.sequence_parallel else x
        return placement.products.output(x_SBH, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        placement: Placement = ctx.placement
        tp, sequence_parallel, overlap = placement.tp, placement.sequence_parallel, placement.overlap
        (x,), weight = ctx.saved_tensors, ctx.weight
        # Each collective runs beside the product that does not need it: the gathered x is for the weight's gradient
        # alone, the sum of grad_x for nothing here. Where the weight's gradient is owed, that sum is simply awaited.
        gathering = begin_all_gather(x, tp, overlap=overlap) if sequence_parallel else Pending(x)
        placement.weight_reads.announce(weight)
        gradients = placement.products.gradients(grad_y)
        grad_x = gradients.grad_x(weight)  # this rank's partial sum
        x_SBH = gathering.wait()
        begin_sum = begin_reduce_scatter if sequence_parallel else begin_all_reduce_
        summing = begin_sum(grad_x, tp, overlap=overlap)
        grad_weight = placement.weight_grads.gradient(weight, gradients, x_SBH)
        return summing.wait(), grad_weight, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, placement: Placement) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.placement = weight, placement
        y = placement.products.output(x, weight)  # this rank's partial sum
        tp = placement.tp
        return reduce_scatter(y, tp) if placement.sequence_parallel else all_reduce_(y, tp)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        placement: Placement = ctx.placement
        tp, sequence_parallel = placement.tp, placement.sequence_parallel
        (x,), weight = ctx.saved_tensors, ctx.weight
        gradients = placement.products.gradients(all_gather(grad_y, tp) if sequence_parallel else grad_y)
        grad_weight = placement.weight_grads.gradient(weight, gradients, x)
        placement.weight_reads.announce(weight)
        return gradients.grad_x(weight), grad_weight, None


class ColumnParallelLinear(nn.Module):
    """``y = x @ W.T``, W split along its output features: ``weight`` is (out_features / tp, in_features), unfilled."""

    def __init__(self, in_features: int, out_features: int, *, placement: Placement) -> None:
        super().__init__()
        tp_size = placement.tp.size
        assert out_features % tp_size == 0, f"{out_features} output features do not split over {tp_size} ranks"
        self.placement = placement
        self.weight = placement.weight(out_features // tp_size, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x_StBH | x_SBH -> y_SBFt.

        Forward: all-gather, St -> S, under sequence parallel; else nothing.
        Backward: all-gather and reduce-scatter, S -> St, under sequence parallel; else all-reduce.
        """
        return apply(_ColumnParallel, x, self.weight, self.placement)


class RowParallelLinear(nn.Module):
    """``y = x @ W.T``, W split along its input features: ``weight`` is (out_features, in_features / tp), unfilled."""

    def __init__(self, in_features: int, out_features: int, *, placement: Placement) -> None:
        super().__init__()
        tp_size = placement.tp.size
        assert in_features % tp_size == 0, f"{in_features} input features do not split over {tp_size} ranks"
        self.placement = placement
        self.weight = placement.weight(out_features, in_features // tp_size)

    def forward(self, x_SBFt: Tensor) -> Tensor:
        """x_SBFt -> y_StBH | y_SBH.

        Forward: reduce-scatter, S -> St, under sequence parallel; else all-reduce.
        Backward: all-gather, St -> S, under sequence parallel; else nothing.
        """
        return apply(_RowParallel, x_SBFt, self.weight, self.placement)
