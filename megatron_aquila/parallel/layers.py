"""Linear layers whose weight is split over the tensor-parallel group.

Both are one autograd Function each, so that what is saved and what is communicated stands here and nowhere else: the
column layer saves its *sharded* input under sequence parallel and gathers it again in backward.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.precision import apply, matmul
from megatron_aquila.parallel.collectives import all_gather, all_reduce_, reduce_scatter
from megatron_aquila.parallel.context import Group


def weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``weight`` in ``y = x @ weight.T``: the leading dims of both are rows. Local."""
    return matmul(grad_y.flatten(0, -2).T, x.flatten(0, -2))


class WeightGradQueue:
    """Weight gradients owed: filled by a backward that leaves them out, paid later, for one key at a time.

    Calling autograd twice would run every Function's backward twice, its collectives too; here a linear hands over the
    one product that is left. What is owed keeps the linear's input, gathered, and the gradient of its output.
    """

    def __init__(self) -> None:
        self._owed: dict[Hashable, list[Callable[[], None]]] = {}
        self._open: list[Callable[[], None]] | None = None

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """Backwards inside leave their linears' weight gradients out, to be paid as ``key``."""
        assert key not in self._owed, f"{key} is owed already"
        self._open = self._owed[key] = []
        try:
            yield
        finally:
            self._open = None

    def gradient(self, weight: Tensor, grad_y: Tensor, x: Tensor) -> Tensor | None:
        """The gradient of ``weight`` for autograd to accumulate now, or None where it is owed. Local."""
        if self._open is None:
            return weight_gradient(grad_y, x)
        self._open.append(lambda: torch.autograd.backward(weight, weight_gradient(grad_y, x)))  # runs the hooks, too
        return None

    def pay(self, key: Hashable) -> None:
        """Accumulate what is owed as ``key``, as its backward would have done. Local."""
        for job in self._owed.pop(key):
            job()

    @property
    def owed(self) -> list[Hashable]:
        """The keys not yet paid."""
        return list(self._owed)


def share_weight_grad_queue(modules: Iterable[nn.Module]) -> WeightGradQueue:
    """One queue for all parallel linears inside ``modules``."""
    queue = WeightGradQueue()
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                layer.weight_grads = queue
    return queue


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tp: Group, sequence_parallel: bool, weight_grads: WeightGradQueue
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.sequence_parallel, ctx.weight_grads = tp, sequence_parallel, weight_grads
        x_SBH = all_gather(x, tp) if sequence_parallel else x
        return matmul(x_SBH, weight.T)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        x_SBH = all_gather(x, ctx.tp) if ctx.sequence_parallel else x
        grad_x = matmul(grad_y, weight)  # this rank's partial sum
        grad_x = reduce_scatter(grad_x, ctx.tp) if ctx.sequence_parallel else all_reduce_(grad_x, ctx.tp)
        return grad_x, ctx.weight_grads.gradient(weight, grad_y, x_SBH), None, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tp: Group, sequence_parallel: bool, weight_grads: WeightGradQueue
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.sequence_parallel, ctx.weight_grads = tp, sequence_parallel, weight_grads
        y = matmul(x, weight.T)  # this rank's partial sum
        return reduce_scatter(y, tp) if sequence_parallel else all_reduce_(y, tp)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        grad_y = all_gather(grad_y, ctx.tp) if ctx.sequence_parallel else grad_y
        return matmul(grad_y, weight), ctx.weight_grads.gradient(weight, grad_y, x), None, None, None


class ColumnParallelLinear(nn.Module):
    """``y = x @ W.T``, W split along its output features: ``weight`` is (out_features / tp, in_features), unfilled."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        assert out_features % tp.size == 0, f"{out_features} output features do not split over {tp.size} ranks"
        self.tp, self.sequence_parallel, self.weight_grads = tp, sequence_parallel, WeightGradQueue()
        self.weight = nn.Parameter(torch.empty(out_features // tp.size, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x_StBH | x_SBH -> y_SBFt.

        Forward: all-gather, St -> S, under sequence parallel; else nothing.
        Backward: all-gather and reduce-scatter, S -> St, under sequence parallel; else all-reduce.
        """
        return apply(_ColumnParallel, x, self.weight, self.tp, self.sequence_parallel, self.weight_grads)


class RowParallelLinear(nn.Module):
    """``y = x @ W.T``, W split along its input features: ``weight`` is (out_features, in_features / tp), unfilled."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        assert in_features % tp.size == 0, f"{in_features} input features do not split over {tp.size} ranks"
        self.tp, self.sequence_parallel, self.weight_grads = tp, sequence_parallel, WeightGradQueue()
        self.weight = nn.Parameter(torch.empty(out_features, in_features // tp.size, dtype=dtype, device=device))

    def forward(self, x_SBFt: Tensor) -> Tensor:
        """x_SBFt -> y_StBH | y_SBH.

        Forward: reduce-scatter, S -> St, under sequence parallel; else all-reduce.
        Backward: all-gather, St -> S, under sequence parallel; else nothing.
        """
        return apply(_RowParallel, x_SBFt, self.weight, self.tp, self.sequence_parallel, self.weight_grads)
