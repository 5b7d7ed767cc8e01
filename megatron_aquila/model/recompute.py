"""Keeping less for backward: what a function made is computed again when its gradient is due."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

Outputs = Tensor | tuple[Tensor, ...]
Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


def feed(function: Callable[..., Outputs], consumer: Callable[..., Tensor], *inputs: Tensor, recompute: bool) -> Tensor:
    """``consumer(*function(*inputs))``; with ``recompute`` only ``inputs`` are kept of ``function``.

    Backward then runs ``function`` again when ``consumer`` needs an output, and goes on through that second run. So
    ``consumer``, say the linear after a norm, is never run again, and an output that it keeps costs nothing. The bits
    are the same: the same kernels see the same inputs. Communicates in backward what ``function`` does forward.

    Without gradients it costs nothing. Hooks on saved tensors that are set outside see what is kept, ``inputs`` too.
    """
    if not (recompute and torch.is_grad_enabled()):
        return consumer(*_several(function(*inputs)))
    outer = _hooks()
    run = _Run(function, inputs, outer)
    outputs = _several(_Recomputed.apply(run, *inputs))  # type: ignore[no-untyped-call]  # torch has no types for it
    places = {id(output): place for place, output in enumerate(outputs)}

    def pack(kept: Tensor) -> Any:
        place = places.get(id(kept))
        return outer.pack(kept) if place is None else _Output(run, place)

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Output):
            return outer.unpack(packed)
        return packed.run.outputs()[packed.place].detach()  # it may be kept, but not the graph behind it

    with saved_tensors_hooks(pack, unpack):
        return consumer(*outputs)


class _Hooks(NamedTuple):
    """Of a saved tensor what is kept, and of that the tensor."""

    pack: Pack
    unpack: Unpack


def _hooks() -> _Hooks:
    """The hooks on saved tensors that are set here. Torch calls the innermost alone, which must pass on to them."""
    found: tuple[Pack, Unpack] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return _Hooks(_itself, _itself) if found is None else _Hooks(*found)


def _itself(x: Tensor) -> Tensor:
    return x


def _several(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


class _Run:
    """A function with its inputs: run again once, with a graph, and only when someone asks."""

    def __init__(self, function: Callable[..., Outputs], inputs: tuple[Tensor, ...], hooks: _Hooks) -> None:
        assert any(x.requires_grad for x in inputs), "nothing that is recomputed has a gradient"
        self.function = function
        self._hooks = hooks
        self._kept = tuple(hooks.pack(x.detach()) for x in inputs)
        self._need_grad = tuple(x.requires_grad for x in inputs)
        self._leaves: tuple[Tensor, ...] = ()
        self._again: tuple[Tensor, ...] = ()

    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs of the second run."""
        if not self._again:
            inputs = zip(map(self._hooks.unpack, self._kept), self._need_grad, strict=True)
            self._leaves = tuple(x.detach().requires_grad_(need_grad) for x, need_grad in inputs)
            with torch.enable_grad():
                self._again = _several(self.function(*self._leaves))
        return self._again

    def gradients(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs; those of weights go where they always go. Nothing is left of the second run."""
        edges = [get_gradient_edge(output) for output in self.outputs()]
        self._again = ()  # the graph does not need the values, the consumer had them
        torch.autograd.backward(edges, grads)
        return tuple(leaf.grad for leaf in self._leaves)


class _Output(NamedTuple):
    """What is kept of a recomputed output: which it is, of what."""

    run: _Run
    place: int


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
