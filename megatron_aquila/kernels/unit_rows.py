"""A weight whose rows are used at length 1 (Baichuan2's NormHead): the weight itself is stored as it is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype, matmul
from megatron_aquila.kernels.weight_gradient import accumulate_weight_gradient_, weight_gradient

SHORTEST = 1e-12  # rows of zeros, as padding is, stay zeros
PIECE = 2**24  # elements that are widened at a time: of a large vocabulary, all would be a step's fullest moment


def unit_rows(weight: Tensor) -> Tensor:
    """Every row divided by its length, computed in ``compute_dtype`` and rounded once."""
    unit = torch.empty_like(weight)
    for rows, part in zip(_in_pieces(unit), _in_pieces(weight), strict=True):
        wide = part.to(compute_dtype(weight.dtype))
        rows.copy_(wide / _lengths(wide))
    return unit


def through_unit_rows_(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``unit_rows(weight)`` made that of ``weight``: its part across each row, over the length."""
    for rows, part in zip(_in_pieces(grad), _in_pieces(weight), strict=True):
        wide = part.to(grad.dtype)
        length = _lengths(wide)
        unit = wide / length
        rows.addcmul_(unit, (rows * unit).sum(-1, keepdim=True), value=-1).div_(length)
    return grad


def _in_pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, PIECE // weight.shape[1]))


def _lengths(weight: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return lengths.clamp_min(SHORTEST)


@dataclass(frozen=True, slots=True)
class UnitRowGradients:
    """The ``Gradients`` of ``UnitRowProducts``."""

    grad_y: Tensor
    weight: Tensor

    def grad_x(self, weight: Tensor) -> Tensor:
        """weight_OI -> grad_x_...I."""
        return matmul(self.grad_y, unit_rows(weight))

    def grad_weight(self, x: Tensor) -> Tensor:
        """x_...I -> grad_weight_OI."""
        wide = weight_gradient(self.grad_y, x).to(compute_dtype(x.dtype))
        return through_unit_rows_(wide, self.weight.detach()).to(x.dtype)

    def add_grad_weight_(self, total: Tensor, x: Tensor) -> None:
        """Add ``grad_weight`` to ``total``: in a pass of its own, as it is no product alone."""
        wide = torch.zeros_like(total)
        accumulate_weight_gradient_(wide, self.grad_y, x)
        total.add_(through_unit_rows_(wide, self.weight.detach()))


class UnitRowProducts:
    """The products of ``y = x @ unit_rows(weight).T``, in the type of the operands."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_...I, weight_OI -> y_...O."""
        return matmul(x, unit_rows(weight).T)

    def gradients(self, grad_y: Tensor) -> UnitRowGradients:
        """grad_y as it is."""
        return UnitRowGradients(grad_y, self._weight)
