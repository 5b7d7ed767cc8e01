"""One observation held against another, tensor by tensor in the order in which they are computed."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.observe import RULES, Observation

# Sums of a few thousand float64 terms in another order: 1e3 * 2^-53 = 1e-13 of the norm, with a margin of ten.
BOUND = 1e-12
Bits = Literal["gradients", "everything"]  # up to which tensor bits must be equal


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far one tensor is off: ``error`` is the norm of the difference over the norm of the reference."""

    tensor: str
    error: float

    @property
    def holds(self) -> bool:
        """Within the bound; NaN is not."""
        return self.error <= BOUND


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a layout, what it was held against, and what was found."""

    axis: str
    layout: Layout
    against: str
    worst: Difference
    first_wrong: str | None  # in the order of computation
    smallest: Layout | None = None  # none of its options can be left out, or it holds

    @property
    def holds(self) -> bool:
        """Whether every tensor is within the bound."""
        return self.first_wrong is None


def tensors(observation: Observation, *, only_gradients: bool = False) -> dict[str, Tensor]:
    """Everything observed by name, in the order of computation: the first wrong one is where the bug shows first.

    Forward, backward (so gradients from the last layer to the first), update, and the second step.
    """
    named = {f"output of {name}": value for name, value in observation.outputs.items()}
    named["loss"] = _scalar(observation.loss)
    named |= {f"gradient of {name}": value for name, value in reversed(list(observation.gradients.items()))}
    if only_gradients:
        return named
    named["gradient norm"] = _scalar(observation.grad_norm)
    for rule in RULES:
        named |= {f"{name} after {rule}": value for name, value in observation.updated[rule].items()}
    for rule in RULES:
        named[f"next loss after {rule}"] = _scalar(observation.next_loss[rule])
    later = reversed(list(observation.next_gradients.items()))
    return named | {f"next gradient of {name}": value for name, value in later}


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def compare(axis: str, layout: Layout, against: str, expected: Observation, found: Observation) -> Row:
    """Hold ``found`` against ``expected``, relative to each tensor's norm."""
    return _row(axis, layout, against, tensors(expected), tensors(found), relative_error)


def compare_bits(axis: str, layout: Layout, twin: Layout, expected: Observation, found: Observation, bits: Bits) -> Row:
    """Hold ``found`` bit for bit against ``expected``, which was observed under ``twin``.

    Where bits are due up to the gradients, their norm is a sum in another order: it and what follows are left out.
    """
    named = [tensors(one, only_gradients=bits == "gradients") for one in (expected, found)]
    return _row(axis, layout, f"{twin}, bit for bit", named[0], named[1], bit_error)


def failed(axis: str, layout: Layout, against: str, why: str) -> Row:
    """The row of a layout that did not run: ``why`` names the rank in its first line and the error further below."""
    first, *rest = why.splitlines()
    errors = [line for line in rest if re.match(r"[\w.]*(Error|Exception)\b", line)]
    text = " ".join([first, *errors[:1]])
    return Row(
        axis=axis, layout=layout, against=against, worst=Difference(tensor="–", error=math.nan), first_wrong=text
    )


def _row(
    axis: str,
    layout: Layout,
    against: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    error: Callable[[Tensor, Tensor], float],
) -> Row:
    differences = [
        Difference(tensor=name, error=error(value, found[name]) if name in found else math.nan)
        for name, value in expected.items()
    ]
    wrong = [difference.tensor for difference in differences if not difference.holds]
    worst = max(differences, key=lambda one: math.inf if math.isnan(one.error) else one.error)
    return Row(axis=axis, layout=layout, against=against, worst=worst, first_wrong=wrong[0] if wrong else None)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """||found - expected|| / ||expected||; the norm of ``found`` where nothing is expected."""
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale if scale > 0 else 1.0)


def bit_error(expected: Tensor, found: Tensor) -> float:
    """0 where every bit is equal, else at least the bound's double."""
    return 0.0 if torch.equal(expected, found) else max(2 * BOUND, relative_error(expected, found))
