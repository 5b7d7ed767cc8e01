"""Keeping less for backward: what a function made is computed again when its gradient is due."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

Outputs = Tensor | tuple[Tensor, ...]


def feed(function: Callable[..., Outputs], consumer: Callable[..., Tensor], *inputs: Tensor, recompute: bool) -> Tensor:
    """``consumer(*function(*inputs))``; with ``recompute`` only ``inputs`` are kept of ``function``.

    Backward then runs ``function`` again when ``consumer`` needs an output, and goes on through that second run. So
    ``consumer``, say the linear after a norm, is never run again, and an output that it keeps costs nothing. The bits
    are the same: the same kernels see the same inputs. Communicates in backward what ``function`` does forward.

    Without gradients it costs nothing.
    """
    if not (recompute and torch.is_grad_enabled()):
        return consumer(*_several(function(*inputs)))
    run = _Run(function, inputs)
    outputs = _several(_Recomputed.apply(run, *inputs))  # type: ignore[no-untyped-call]  # torch has no types for it
    places = {id(output): place for place, output in enumerate(outputs)}

    def pack(kept: Tensor) -> Any:
        place = places.get(id(kept))
        return kept if place is None else (run, place)

    with saved_tensors_hooks(pack, _unpack):
        return consumer(*outputs)


def _several(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    run, place = packed
    value: Tensor = run.outputs()[place].detach()  # the consumer may keep it, but not the graph behind it
    return value


class _Run:
    """A function with its inputs: run again once, with a graph, and only when someone asks."""

    def __init__(self, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]) -> None:
        assert any(x.requires_grad for x in inputs), "nothing that is recomputed has a gradient"
        self.function = function
        self._leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        self._again: tuple[Tensor, ...] = ()

    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs of the second run."""
        if not self._again:
            with torch.enable_grad():
                self._again = _several(self.function(*self._leaves))
        return self._again

    def gradients(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs; those of weights go where they always go. Nothing is left of the second run."""
        edges = [get_gradient_edge(output) for output in self.outputs()]
        self._again = ()  # the graph does not need the values, the consumer had them
        torch.autograd.backward(edges, grads)
        return tuple(leaf.grad for leaf in self._leaves)


class _Recomputed(torch.autograd.Function):
    """Runs forward without a graph, and backward through the graph of a second run."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *inputs: Tensor) -> Outputs:
        ctx.run = run
        return run.function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run, ctx.run = ctx.run, None  # so that its inputs are freed with this frame
        return None, *run.gradients(grads)
