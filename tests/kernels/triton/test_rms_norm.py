import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.rms_norm import (
    Order,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_triton,
)
from tests.kernels.triton.common import DEVICE, DTYPES, EPS32, draw, exact, outcome, unit, worst

EPS = 1e-5
ORDERS = ["aquila", "llama"]


def bounds(x: Tensor, weight: Tensor, grad: Tensor, order: Order, more: Tensor | float = 0.0) -> list[Tensor]:
    """What rounding allows: of the output, of x's gradient (plus ``more``) and of the weight's.

    A result is rounded to the type once; in Llama's order the normed value was, before. In float32 a sum of n terms
    errs by less than log2(n) + 1 units of the sum of their magnitudes where it is a tree, by n where it is a loop.
    """
    to, twice = unit(x.dtype), order == "llama"
    x, weight, grad = (t.double() for t in (x, weight, grad))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    normed = x * scale
    y, along = normed * weight, (grad * weight * normed)
    grad_x = scale * (grad * weight - normed * along.mean(-1, keepdim=True)) + more
    reach = scale * ((grad * weight).abs() + normed.abs() * along.abs().mean(-1, keepdim=True)) + abs(more)
    terms = (grad * normed).flatten(0, -2)
    units = (math.log2(x.shape[-1]) + 12) * EPS32
    return [
        (to * (1 + twice) * (1 + to) + units) * y.abs(),
        to * grad_x.abs() + 2 * units * reach,
        to * terms.sum(0).abs() + (to * twice + units + len(terms) * EPS32) * terms.abs().sum(0),
    ]


def held(x: Tensor, weight: Tensor, grad: Tensor, order: Order, norm=rms_norm_triton) -> list[float]:
    """Errors of ``norm`` as shares of what is allowed: output, gradient of x, gradient of the weight."""
    ours = outcome(lambda x, w: norm(x, w, eps=EPS, order=order), [x, weight], grad)
    right = exact(lambda x, w: rms_norm_reference(x, w, eps=EPS, order=order), [x, weight], grad)
    assert [t.dtype for t in ours] == [x.dtype, x.dtype, weight.dtype]
    return [worst(*each) for each in zip(ours, right, bounds(x, weight, grad, order), strict=True)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_with_gradients(dtype: torch.dtype, order: Order) -> None:
    """100 is no power of two; 21 rows are more than the interpreter's programs, so that each takes several."""
    x, weight = draw(7, 3, 100, dtype=dtype), draw(100, dtype=dtype)
    assert max(held(x, weight, x + draw(7, 3, 100, dtype=dtype), order)) <= 1


@settings(max_examples=8)
@given(rows=st.integers(0, 9), size=st.integers(1, 70), order=st.sampled_from(ORDERS), dtype=st.sampled_from(DTYPES))
def test_any_small_shape(rows: int, size: int, order: Order, dtype: torch.dtype) -> None:
    x, weight, grad = draw(rows, size, dtype=dtype), draw(size, dtype=dtype), draw(rows, size, dtype=dtype)
    assert max(held(x, weight, grad, order)) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_values_do_not_overflow(dtype: torch.dtype) -> None:
    x = draw(4, 64).clamp(-2, 2) * 30000  # squares are 3.6e9, and float16 ends at 65504
    assert max(held(x.to(dtype), draw(64, dtype=dtype), draw(4, 64, dtype=dtype), "aquila")) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_views_of_all_kinds(dtype: torch.dtype) -> None:
    weight = draw(24, dtype=dtype)
    wide = draw(4, 3, 40, dtype=dtype)
    for x in (
        wide[..., 8:32],
        wide[:, 1:2, 5:29],
        wide[:, :, ::2][..., :20],
        wide.transpose(0, 2)[:24].transpose(0, 2),
    ):
        w = weight[: x.shape[-1]]
        assert max(held(x, w, draw(*x.shape, dtype=dtype), "aquila")) <= 1
        assert max(held(x, w, draw(1, dtype=dtype).expand(x.shape), "aquila")) <= 1  # what a sum sends back


def test_no_rows() -> None:
    y, grad_x, grad_weight = outcome(
        lambda x, w: rms_norm_triton(x, w, eps=EPS, order="aquila"), [draw(0, 3, 16), draw(16)], draw(0, 3, 16)
    )
    assert y.shape == grad_x.shape == (0, 3, 16)
    assert torch.equal(grad_weight, torch.zeros(16, device=DEVICE))


def test_orders_round_as_the_reference_does() -> None:
    """To the bit but where float32 sums in another order fall on the other side of a rounding."""
    x, weight = draw(16, 128, dtype=torch.float16), draw(128, dtype=torch.float16)
    for order in ORDERS:
        ours, own = (norm(x, weight, eps=EPS, order=order) for norm in (rms_norm_triton, rms_norm))
        other = rms_norm(x, weight, eps=EPS, order=ORDERS[1 - ORDERS.index(order)])
        assert (ours != own).float().mean() < 0.01
        assert (ours != other).float().mean() > 0.1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_residual_added(dtype: torch.dtype, order: Order) -> None:
    x, residual, weight = draw(7, 3, 100, dtype=dtype), draw(7, 3, 100, dtype=dtype), draw(100, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    total, y = add_rms_norm_triton(*leaves, eps=EPS, order=order)
    grad_total, grad_y = draw(7, 3, 100, dtype=dtype), draw(7, 3, 100, dtype=dtype)
    grads = torch.autograd.grad([total, y], leaves, [grad_total, grad_y])
    assert torch.equal(grads[0], grads[1])
    total, plain = total.detach(), (x + residual).detach()
    if dtype is torch.bfloat16 and DEVICE.type == "cpu":
        assert worst(total, plain.double(), unit(dtype) * plain.double().abs()) <= 1
    else:
        assert torch.equal(total, plain)
    right = exact(lambda x, w: rms_norm_reference(x, w, eps=EPS, order=order), [total, weight], grad_y)
    right[1] += grad_total.double()
    ours = [y.detach(), grads[0], grads[2]]
    allowed = bounds(total, weight, grad_y, order, more=grad_total.double())
    assert max(worst(*each) for each in zip(ours, right, allowed, strict=True)) <= 1


def test_an_output_that_nobody_uses() -> None:
    leaves = [draw(4, 16).requires_grad_(), draw(4, 16).requires_grad_(), draw(16).requires_grad_()]
    total, y = add_rms_norm_triton(*leaves, eps=EPS, order="aquila")
    grad = draw(4, 16)
    of_x, of_residual, of_weight = torch.autograd.grad(total, leaves, grad, retain_graph=True, allow_unused=True)
    assert torch.equal(of_x, grad)
    assert torch.equal(of_residual, grad)
    assert of_weight is None
    alone = outcome(lambda x, w: rms_norm_triton(x, w, eps=EPS, order="aquila"), [total.detach(), leaves[2]], grad)
    assert torch.equal(torch.autograd.grad(y, leaves, grad)[0], alone[1])


def test_the_same_bits_in_every_run() -> None:
    x, weight, grad = draw(50, 64), draw(64), draw(50, 64)
    first, second = (
        outcome(lambda x, w: rms_norm_triton(x, w, eps=EPS, order="llama"), [x, weight], grad) for _ in "ab"
    )
    assert all(map(torch.equal, first, second))


def test_little_is_kept_for_backward() -> None:
    x, weight = draw(8, 64, dtype=torch.bfloat16).requires_grad_(), draw(64, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rms_norm_triton(x, weight, eps=EPS, order="aquila")
    assert sorted(t.numel() * t.element_size() for t in kept) == [8 * 4, 64 * 2, 8 * 64 * 2]


def test_the_bounds_tell_wrong_answers() -> None:
    x, weight = draw(7, 3, 100, dtype=torch.bfloat16), draw(100, dtype=torch.bfloat16)
    grad = x + draw(7, 3, 100, dtype=torch.bfloat16)

    def without_projection(x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
        scale = torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + eps)
        return (x.float() * scale * weight.float()).to(x.dtype)

    def larger(x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
        return rms_norm(x, weight * 1.05, eps=eps, order=order)

    assert held(x, weight, grad, "aquila", without_projection)[1] > 10
    assert min(held(x, weight, grad, "aquila", larger)) > 3


def test_misuse() -> None:
    with pytest.raises(AssertionError, match=r"rows \(4, 8\) are added to \(3, 8\)"):
        add_rms_norm_triton(draw(3, 8), draw(4, 8), draw(8), eps=EPS, order="aquila")
    with pytest.raises(AssertionError, match=r"torch.float16 is added to torch.float32"):
        add_rms_norm_triton(draw(3, 8), draw(3, 8, dtype=torch.float16), draw(8), eps=EPS, order="aquila")
    with pytest.raises(AssertionError, match="a row of 40000 does not fit"):
        rms_norm_triton(draw(1, 40000), draw(40000), eps=EPS, order="aquila")
    x = draw(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(
        rms_norm_triton(x, draw(8), eps=EPS, order="aquila").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
