import pytest
import torch

from megatron_aquila.kernels.swiglu import swiglu, swiglu_reference


def test_first_half_is_the_gate() -> None:
    gate, up = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    expected = torch.nn.functional.silu(gate) * up
    assert torch.equal(swiglu(torch.cat((gate, up), -1)), expected)
    assert not torch.allclose(swiglu(torch.cat((up, gate), -1)), expected)


@pytest.mark.parametrize(
    # bfloat16: both round the same float32 gradient once, computed in another order
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 2e-7), (torch.bfloat16, 2**-9)],
)
def test_equals_the_reference_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(5, 3, 32, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(5, 3, 16, dtype=dtype)
    assert torch.equal(swiglu(x), swiglu_reference(x))
    (ours,), (reference,) = (torch.autograd.grad(f(x), x, grad_y) for f in (swiglu, swiglu_reference))
    assert (ours - reference).norm() <= tolerance * reference.norm()


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True))


def test_only_the_input_is_kept_for_backward() -> None:
    x = torch.randn(5, 3, 32).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
