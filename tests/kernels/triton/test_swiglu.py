import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.swiglu import swiglu_reference, swiglu_triton
from tests.kernels.triton.common import DEVICE, DTYPES, EPS32, draw, exact, outcome, unit, worst


def bounds(gate_up: Tensor, grad: Tensor) -> list[Tensor]:
    """One rounding to the type, and in float32 a dozen and those of exp, whose argument's error grows with it."""
    to = unit(gate_up.dtype)
    (gate, up), grad = gate_up.double().chunk(2, dim=-1), grad.double()
    units = (12 + 2 * gate.abs()) * EPS32
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    slope, reach = sigmoid + silu * (1 - sigmoid), sigmoid + silu.abs() * (1 - sigmoid)
    of_gate = to * (grad * up * slope).abs() + units * (grad * up).abs() * reach
    gone = torch.finfo(torch.float32).tiny * gate.abs()  # of a sigmoid below the smallest float32
    products = [(to + units) * (silu * other).abs() + gone * other.abs() for other in (up, grad)]
    return [products[0], torch.cat((of_gate + gone * (grad * up).abs(), products[1]), dim=-1)]


def held(gate_up: Tensor, grad: Tensor, function=swiglu_triton) -> list[float]:
    ours = outcome(function, [gate_up], grad)
    assert all(t.dtype is gate_up.dtype for t in ours)
    right = exact(swiglu_reference, [gate_up], grad)
    return [worst(*each) for each in zip(ours, right, bounds(gate_up, grad), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_with_gradients(dtype: torch.dtype) -> None:
    assert max(held(3 * draw(5, 3, 2 * 90, dtype=dtype), draw(5, 3, 90, dtype=dtype))) <= 1


@settings(max_examples=8)
@given(rows=st.integers(0, 4), size=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_any_small_shape(rows: int, size: int, dtype: torch.dtype) -> None:
    assert max(held(draw(rows, 2 * size, dtype=dtype), draw(rows, size, dtype=dtype))) <= 1


def test_a_row_of_several_blocks() -> None:
    assert max(held(draw(2, 2 * 4100), draw(2, 4100))) <= 1


def test_views() -> None:
    wide = draw(3, 2, 50)
    for gate_up in (wide[..., 4:44], wide[:, :1, 4:44], wide[..., :40].transpose(0, 1), wide.transpose(0, 2)):
        grad = draw(1).expand(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        even = gate_up[..., : gate_up.shape[-1] // 2 * 2]
        assert max(held(even, grad)) <= 1


def test_large_gates() -> None:
    """silu is the gate itself or 0 there, its slope 1 or 0; float16 overflows where the reference does."""
    gate = torch.tensor([-60000.0, -1000.0, -90.0, 90.0, 1000.0, 60000.0], device=DEVICE)
    up, grad = torch.ones(6, device=DEVICE), torch.ones(1, 6, device=DEVICE)
    for dtype in DTYPES:
        assert max(held(torch.cat((gate, up))[None].to(dtype), grad.to(dtype))) <= 1
    big = torch.cat((gate, 2 * up))[None].half()
    assert torch.equal(swiglu_triton(big).isinf(), swiglu_reference(big).isinf())
    assert swiglu_triton(big).isinf().any()


def test_only_the_input_is_kept_for_backward() -> None:
    x = draw(5, 3, 32, dtype=torch.bfloat16).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        swiglu_triton(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_the_bounds_tell_wrong_answers() -> None:
    gate_up, grad = draw(5, 180, dtype=torch.bfloat16), draw(5, 90, dtype=torch.bfloat16)

    def gate_last(x: Tensor) -> Tensor:
        return swiglu_reference(torch.cat((*x.chunk(2, dim=-1)[::-1],), dim=-1))

    def without_slope(x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (gate * gate.detach().sigmoid() * up).to(x.dtype)

    assert min(held(gate_up, grad, gate_last)) > 10
    assert held(gate_up, grad, without_slope)[1] > 10
