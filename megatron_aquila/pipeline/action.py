"""What one pipeline rank does, as data."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple


class Op(StrEnum):
    """A kind of work on one microbatch."""

    F = "F"  # forward through one stage
    B = "B"  # backward through one stage, for the gradients of its input and of its weights
    I = "I"  # backward for the gradient of the stage's input only
    W = "W"  # what I left: backward for the gradients of the stage's weights


class Action(NamedTuple):
    """``op`` of ``microbatch`` on ``stage``. Stages are numbered along the model; stage 0 holds the embedding.

    A tuple, not a dataclass: the checks look up a hundred thousand of them, and a tuple is hashed in C.
    """

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"  # torch.distributed.pipelining's notation

    def inputs(self, num_stages: int) -> tuple["Action", ...]:
        """The actions that must be done before this one may start: the whole dependency graph is these lines.

        A schedule splits all of its backwards into I and W, or none: a B waits for a B, an I for an I.
        """
        if self.op is Op.F:
            return (Action(Op.F, self.stage - 1, self.microbatch),) if self.stage > 0 else ()
        if self.op is Op.W:
            return (Action(Op.I, self.stage, self.microbatch),)
        own = Action(Op.F, self.stage, self.microbatch)
        return (own, Action(self.op, self.stage + 1, self.microbatch)) if self.stage + 1 < num_stages else (own,)


Program = Sequence[Action]  # what one rank does, in order
Schedule = Mapping[int, Program]  # pipeline rank -> its program
