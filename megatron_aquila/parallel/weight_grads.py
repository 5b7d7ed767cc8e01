"""Weight gradients of the parallel linears: computed in their backward, or owed until the schedule asks for them."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.precision import compute_dtype
from megatron_aquila.kernels.products import Gradients


def _nothing() -> None:
    """Memory that is always there needs nothing."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class MainGrad:
    """The sum of a parameter's gradients over the microbatches, in the parameter's shape.

    Whoever adds one to ``total`` says so by calling ``added``. ``ready`` is called first: it makes sure that ``memory``
    is there to be added to, which may mean to wait for a reduction of what was added before.
    """

    memory: Tensor
    added: Callable[[], None]
    ready: Callable[[], None] = _nothing

    @property
    def total(self) -> Tensor:
        """The sum, to be added to."""
        self.ready()
        return self.memory


class WeightGradQueue:
    """Where the linears' weight gradients go: to autograd, or straight into the sums of ``accumulate_into``.

    Also those owed: filled by a backward that leaves them out, paid later, for one key at a time. Calling autograd
    twice would run every Function's backward twice, its collectives too; here a linear hands over the one product that
    is left. What is owed keeps the linear's input, gathered, and the gradient of its output.
    """

    def __init__(self) -> None:
        self._main_grads: Mapping[nn.Parameter, MainGrad] = {}
        self._owed: dict[Hashable, list[Callable[[], None]]] = {}
        self._open: list[Callable[[], None]] | None = None

    def accumulate_into(self, main_grads: Mapping[nn.Parameter, MainGrad]) -> None:
        """From here on the product that is a weight's gradient adds itself to the weight's sum, and autograd has none.

        Not bit-equal to autograd's way: the product is not rounded to the weight's type before it is added.
        """
        self._main_grads = main_grads

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """Backwards inside leave their linears' weight gradients out, to be paid as ``key``."""
        assert key not in self._owed, f"{key} is owed already"
        self._open = self._owed[key] = []
        try:
            yield
        finally:
            self._open = None

    def gradient(self, weight: nn.Parameter, gradients: Gradients, x: Tensor) -> Tensor | None:
        """The gradient of ``weight`` for autograd to accumulate, or None where it was added to its sum or is owed.

        Local, unless a sum that is now complete sends itself on. Nothing is computed for a weight that is not trained.
        """
        if not weight.requires_grad:
            return None
        if self._open is not None:
            values = x.data  # what autograd saved has its graph, which holds what a recomputed layer began with
            self._open.append(lambda: self._accumulate(weight, gradients, values))
            return None
        if weight in self._main_grads:
            self._accumulate(weight, gradients, x)
            return None
        return gradients.grad_weight(x)

    def begin_sum(self, weight: nn.Parameter) -> Tensor | None:
        """Where pieces of a gradient of ``weight`` are to be added, even in forward, before ``end_sum``. Local.

        None where the weight is not trained.
        """
        if not weight.requires_grad:
            return None
        main = self._main_grads.get(weight)
        if main is not None:
            return main.total
        return torch.zeros(weight.shape, dtype=compute_dtype(weight.dtype), device=weight.device)

    def end_sum(self, weight: nn.Parameter, total: Tensor | None) -> Tensor | None:
        """All pieces have been added to ``total``: like ``gradient``, of a product that was taken already."""
        if total is None:
            return None
        main = self._main_grads.get(weight)
        if self._open is not None:
            self._open.append(
                main.added
                if main is not None
                else lambda: torch.autograd.backward(weight, total.to(weight.dtype))  # runs the parameter's hooks, too
            )
        elif main is not None:
            main.added()
        else:
            return total.to(weight.dtype)
        return None

    def pay(self, key: Hashable) -> None:
        """Accumulate what is owed as ``key``, as its backward would have done. Communicates as ``gradient``."""
        jobs = self._owed.pop(key)
        while jobs:
            jobs.pop(0)()  # with the job go its operands

    @property
    def owed(self) -> list[Hashable]:
        """The keys not yet paid."""
        return list(self._owed)

    @torch.no_grad()
    def _accumulate(self, weight: nn.Parameter, gradients: Gradients, x: Tensor) -> None:
        """As inside a backward, where autograd records nothing."""
        main = self._main_grads.get(weight)
        if main is None:
            torch.autograd.backward(weight, gradients.grad_weight(x))  # runs the parameter's hooks, too
        else:
            gradients.add_grad_weight_(main.total, x)
            main.added()
