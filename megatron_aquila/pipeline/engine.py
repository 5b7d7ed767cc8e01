"""Runs one rank's program. Knows actions and tensors, and no schedule by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.weight_grads import WeightGradQueue
from megatron_aquila.pipeline.action import Action, Op, Program
from megatron_aquila.pipeline.wire import Wire

Stage = Callable[[Tensor | None, Batch], Tensor]  # (what the stage before sent, microbatch) -> what the next one needs
LossFn = Callable[[Tensor, Batch], Tensor]  # (what the last stage computed, microbatch) -> scalar to differentiate


@dataclass(frozen=True, slots=True)
class _Held:
    """What a forward leaves for its backward: where its input came in, and where backward enters the graph.

    Neither the input nor the output is kept: layers save what they need, and an output that was sent is not needed.
    """

    entry: "_Entry | None"
    edge: GradientEdge


class _Entry:
    """Where a received activation enters a stage's graph. A leaf of that graph would keep the activation's values."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None

    def open(self, x: Tensor) -> Tensor:
        """``x``, whose gradient will be here after backward. Local."""
        leaf = torch.empty(0, device=x.device, requires_grad=True)
        received: Tensor = _Received.apply(leaf, x, self)  # type: ignore[no-untyped-call]  # torch has no types for it
        return received


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _leaf: Tensor, x: Tensor, entry: _Entry) -> Tensor:
        ctx.entry = entry
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.entry.grad = grad.contiguous()
        return None, None, None


class Engine:
    """Runs programs over this rank's ``stages``, accumulating gradients into their parameters.

    The order of microbatches is the same on every stage and in every schedule, so gradients are bit-equal to those of
    one process that ran the same microbatches through the whole model.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        num_stages: int,
        loss_fn: LossFn,
        wire: Wire,
        weight_grads: WeightGradQueue | None = None,
    ) -> None:
        self._stages = stages
        self._last = num_stages - 1
        self._loss_fn = loss_fn
        self._wire = wire
        # the queue of the stages' linears: what an I leaves there, its W pays
        self._weight_grads = WeightGradQueue() if weight_grads is None else weight_grads

    def step(self, program: Program, batches: Sequence[Batch]) -> None:
        """Forward and backward of ``batches``, microbatch by microbatch, as ``program`` orders them.

        Communicates: an activation to the next stage and a gradient to the one before, each microbatch. What the next
        action needs is received while this one computes.
        """
        held: dict[tuple[int, int], _Held] = {}
        for action in self._walk(program):
            key = action.stage, action.microbatch
            if action.op is Op.F:
                entry, y = self._forward(*key, batches[action.microbatch])
                held[key] = _Held(entry, get_gradient_edge(y))
                del y  # or this microbatch's output would live until the next forward
            elif action.op is Op.W:
                self._weight_grads.pay(key)
            else:
                with self._weight_grads.deferring(key) if action.op is Op.I else nullcontext():
                    self._backward(*key, held.pop(key))
        self._wire.flush()
        assert not self._weight_grads.owed, f"weight gradients left over: {self._weight_grads.owed}"
        assert not held, f"activations left over: {[f'{stage}F{microbatch}' for stage, microbatch in held]}"

    def evaluate(self, program: Program, batches: Sequence[Batch]) -> None:
        """Forward only, nothing kept: ``loss_fn`` sees what the last stage computed.

        Communicates: an activation to the next stage, each microbatch.
        """
        with torch.no_grad():
            for action in self._walk(program):
                assert action.op is Op.F, f"{action} in a program for evaluation"
                self._forward(action.stage, action.microbatch, batches[action.microbatch])
        self._wire.flush()

    def _walk(self, program: Program) -> Iterator[Action]:
        """The actions, each once what the next one will receive is on its way: it travels while this one computes."""
        for action, following in pairwise([None, *program, None]):
            if following is not None and self._receives(following):
                self._wire.expect(Op.F if following.op is Op.F else Op.B, following.stage, following.microbatch)
            if action is not None:
                yield action

    def _receives(self, action: Action) -> bool:
        """Whether the action's input comes over the wire."""
        return action.op is not Op.W and action.stage != (0 if action.op is Op.F else self._last)

    def _forward(self, stage: int, microbatch: int, batch: Batch) -> tuple[_Entry | None, Tensor]:
        entry, x = None, None
        if stage > 0:
            entry = _Entry()
            x = entry.open(self._wire.recv(Op.F, stage, microbatch))
        y = self._stages[stage](x, batch)
        if stage == self._last:
            return entry, self._loss_fn(y, batch)
        self._wire.send(Op.F, stage + 1, microbatch, y.detach())
        return entry, y

    def _backward(self, stage: int, microbatch: int, held: _Held) -> None:
        dy = None if stage == self._last else self._wire.recv(Op.B, stage, microbatch)
        torch.autograd.backward(held.edge, dy)
        if held.entry is not None:
            assert held.entry.grad is not None, f"stage {stage} did not use its input"
            self._wire.send(Op.B, stage - 1, microbatch, held.entry.grad)
