import pytest
import torch

from megatron_aquila.kernels.unit_rows import PIECE, UnitRowProducts, through_unit_rows_, unit_rows
from megatron_aquila.plan.loss_chunks import UNIT_ROW_ELEMENTS


def test_products_and_gradients_are_those_of_the_divided_weight() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    x, grad_y = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 7, dtype=torch.float64)
    y = x @ (weight / weight.norm(dim=1, keepdim=True)).T
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y)
    products = UnitRowProducts(weight.detach())
    total = torch.ones_like(weight)
    gradients = products.gradients(grad_y)
    gradients.add_grad_weight_(total, x.detach())
    for ours, expected in (
        (products.output(x.detach(), weight.detach()), y),
        (gradients.grad_x(weight.detach()), grad_x),
        (gradients.grad_weight(x.detach()), grad_weight),
        (total - 1, grad_weight),
    ):
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-13)


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert torch.equal(unit_rows(weight), weight)
    assert torch.equal(through_unit_rows_(torch.zeros(2, 3), weight), torch.zeros(2, 3))


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grad = torch.randn(7, 5).bfloat16(), torch.randn(7, 5)
    whole = unit_rows(weight), through_unit_rows_(grad.clone(), weight)
    monkeypatch.setattr("megatron_aquila.kernels.unit_rows.PIECE", 11)
    assert torch.equal(unit_rows(weight), whole[0])
    assert torch.equal(through_unit_rows_(grad, weight), whole[1])


def test_the_plan_knows_how_large_a_piece_is() -> None:
    assert PIECE == UNIT_ROW_ELEMENTS


def test_rounded_once() -> None:
    weight = torch.randn(50, 40).bfloat16()
    assert torch.equal(unit_rows(weight), (weight.float() / weight.float().norm(dim=1, keepdim=True)).bfloat16())
