"""What a pass of the schedule goes through, part by part of its stage, and what it does to the weights on the way."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_aquila.plan.recompute import RecomputePlan
from megatron_aquila.plan.stages import StagePlan

Pass = tuple[str, int, int]  # F, B, I or W, the stage and the microbatch: what pipeline.action.Action is
Order = Mapping[int, Sequence[Pass]]  # pipeline rank -> its work for a step: what pipeline.action.Schedule is
Part = Literal["embedding", "qkv", "attention", "out", "gate_up", "swiglu", "down", "head"]
Deed = Literal["read", "add", "done"]
# The parts of a layer in forward order, and where their matrices are among its parameters: two norms come first.
LAYER: dict[Part, int | None] = {"qkv": 2, "attention": None, "out": 3, "gate_up": 4, "swiglu": None, "down": 5}
LAYER_SIZE = 6  # parameters of a layer


class Work(NamedTuple):
    """``op`` on a ``part`` of a stage, in ``layer``, counted from the stage's first, or outside them.

    ``op`` is that of its pass, or R where a backward runs a layer again. ``place``: of its matrix among
    ``plan.buckets.stage_parameters``. ``deeds``: what is done to it, in order: its weight is read; something is added
    to the sum of its gradients; and what was added is all of this microbatch.
    """

    op: str
    part: Part
    layer: int | None
    place: int | None
    deeds: tuple[Deed, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """``keeps_logits``: the head is a linear like others, else it and the loss are one. ``fuse_main_grads``: a linear
    adds to its main gradient itself, and forward already to the head's; else autograd does, after the linear.
    """

    stages: StagePlan
    recompute: RecomputePlan
    keeps_logits: bool
    fuse_main_grads: bool

    def works(self, op: str, stage: int, microbatch: int) -> Iterator[Work]:
        """A pass. In W the linears come as in I; the embedding is none, so that its gradient is never put off.

        A group of layers that is recomputed runs forward again, but for its last matrix.
        """
        layers = range(len(self.stages.layers[stage]))
        if op == "F":
            yield from self._ends(op, stage, at_start=True)
            for layer in layers:
                yield from self._layer(op, stage, layer)
            yield from self._ends(op, stage, at_start=False)
            return
        yield from self._ends(op, stage, at_start=False)
        groups = self.recompute.at(stage, microbatch).groups if op != "W" else ()
        stop = sum(groups)
        for layer in reversed(layers[stop:]):
            yield from self._layer(op, stage, layer)
        for size in reversed(groups):
            group = layers[stop - size : stop]
            *again, _last = (work for layer in group for work in self._layer("R", stage, layer))
            yield from again
            for layer in reversed(group):
                yield from self._layer(op, stage, layer)
            stop -= size
        yield from self._ends(op, stage, at_start=True)

    def _layer(self, op: str, stage: int, layer: int) -> Iterator[Work]:
        first = self.stages.has_embedding(stage) + LAYER_SIZE * layer
        for part in LAYER if op in "FR" else reversed(LAYER):
            place = LAYER[part]
            if place is not None:
                yield Work(op, part, layer, first + place, self._of_linear(op, part))
            elif op != "W":
                yield Work(op, part, layer, None, ())

    def _of_linear(self, op: str, part: Part) -> tuple[Deed, ...]:
        """A row-parallel linear takes its weight's gradient first, a column-parallel one its input's."""
        if op in "FRI":
            return ("read",)
        if op == "W":
            return ("add", "done")
        return ("add", "done", "read") if part in ("out", "down") and self.fuse_main_grads else ("read", "add", "done")

    def _ends(self, op: str, stage: int, *, at_start: bool) -> Iterator[Work]:
        """The embedding, or the head."""
        if at_start and self.stages.has_embedding(stage) and op != "W":
            yield Work(op, "embedding", None, 0, ("read",) if op == "F" else ("add", "done"))
        if not at_start and self.stages.has_head(stage):
            place = self.stages.has_embedding(stage) + LAYER_SIZE * len(self.stages.layers[stage]) + 1
            yield Work(op, "head", None, place, self._of_head(op))

    def _of_head(self, op: str) -> tuple[Deed, ...]:
        if self.keeps_logits:
            return self._of_linear(op, "head")
        if op == "F":
            return ("read", "add") if self.fuse_main_grads else ("read",)
        if op == "I":
            return ()
        return ("done",) if self.fuse_main_grads else ("add", "done")
