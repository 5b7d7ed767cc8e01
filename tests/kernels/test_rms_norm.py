import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_aquila.kernels.rms_norm import Order, rms_norm, rms_norm_reference, rms_norm_torch

EPS = 1e-5


def gradients(norm, x: torch.Tensor, weight: torch.Tensor, order: Order) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = norm(x, weight, eps=EPS, order=order)
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), torch.randn(y.shape, dtype=y.dtype))]


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_torch])
@pytest.mark.parametrize("order", ["aquila", "llama"])
@pytest.mark.parametrize(
    # float32: sums of 64 values; bfloat16: the reference's backward rounds to 8 bits several times, ours once
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-6)],
)
def test_equals_the_reference_with_gradients(norm, order: Order, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    for ours, reference in zip(
        gradients(norm, x, weight, order), gradients(rms_norm_reference, x, weight, order), strict=True
    ):
        assert ours.dtype is reference.dtype is dtype
        assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("order", ["aquila", "llama"])
def test_gradcheck(order: Order) -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS, order=order), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_order_is_transformers_llama_to_the_bit(dtype: torch.dtype) -> None:
    x, theirs = torch.randn(4, 2, 64).to(dtype), LlamaRMSNorm(64, eps=EPS).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    assert torch.equal(rms_norm(x, theirs.weight, eps=EPS, order="llama"), theirs(x))


def test_orders_differ_in_bfloat16_and_only_there() -> None:
    x, weight = torch.randn(8, 64), torch.randn(64)
    assert torch.equal(*(rms_norm(x, weight, eps=EPS, order=order) for order in ("aquila", "llama")))
    x, weight = x.bfloat16(), weight.bfloat16()
    aquila, llama = (rms_norm(x, weight, eps=EPS, order=order).double() for order in ("aquila", "llama"))
    exact = rms_norm(x.double(), weight.double(), eps=EPS, order="aquila")
    assert not torch.equal(aquila, llama)
    assert (aquila - exact).norm() < 0.8 * (llama - exact).norm(), "Aquila's order rounds once and is closer"


def test_little_is_kept_for_backward() -> None:
    x, weight = torch.randn(8, 64).bfloat16().requires_grad_(), torch.randn(64).bfloat16()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rms_norm(x, weight, eps=EPS, order="aquila")
    assert sorted(t.numel() * t.element_size() for t in kept) == [8 * 4, 64 * 2, 8 * 64 * 2]
