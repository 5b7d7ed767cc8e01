"""Weight gradients of the parallel linears: computed in their backward, or owed until the schedule asks for them."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import matmul


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
