import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_aquila.kernels.weight_gradient import (
    accumulate_weight_gradient_,
    accumulate_weight_gradient_reference_,
    weight_gradient,
)

ROWS, OUT, IN = 300, 5, 7
UNIT = {torch.float64: 2**-53, torch.float32: 2**-24}


def operands(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sum as it stands, and a gradient and an input of ``ROWS`` rows in two leading dims."""
    wide = torch.promote_types(dtype, torch.float32)
    total, grad_y, x = torch.randn(OUT, IN), torch.randn(ROWS // 3, 3, OUT), torch.randn(ROWS // 3, 3, IN)
    return total.to(device, wide), grad_y.to(device, dtype), x.to(device, dtype)


def check_against_reference(dtype: torch.dtype, device: str = "cpu") -> None:
    total, grad_y, x = operands(dtype, device)
    fused, reference = total.clone(), total.clone()
    accumulate_weight_gradient_(fused, grad_y, x)
    accumulate_weight_gradient_reference_(reference, grad_y, x)
    product = torch.einsum("abo,abi->oi", grad_y.double(), x.double())
    size = total.double().abs() + torch.einsum("abo,abi->oi", grad_y.double().abs(), x.double().abs())
    # a sum of ROWS + 1 terms in the type of the total loses at most as many roundings of the terms' size
    bound = (ROWS + 1) * UNIT[total.dtype] * size
    assert fused.dtype is total.dtype
    assert ((fused.double() - (total.double() + product)).abs() <= bound).all()
    # the reference also rounds the product to the operands' type: half an ulp of 8 or 11 significant bits
    rounding = product.abs() * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    assert ((reference.double() - fused.double()).abs() <= 2 * bound + rounding).all()
    if dtype is torch.bfloat16:
        assert not ((reference.double() - fused.double()).abs() <= 2 * bound).all(), "rounding the product would show"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accumulates_as_the_reference_without_rounding_the_product(dtype: torch.dtype) -> None:
    check_against_reference(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA multiplies 16-bit tensors into a float32 sum")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accumulates_on_a_gpu(dtype: torch.dtype) -> None:
    check_against_reference(dtype, "cuda")


def test_is_the_gradient_autograd_computes() -> None:
    _, grad_y, x = operands(torch.float64)
    weight = torch.randn(OUT, IN, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x, weight).backward(grad_y)
    assert weight.grad is not None
    torch.testing.assert_close(weight_gradient(grad_y, x), weight.grad, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_compile_passes_over_it(dtype: torch.dtype) -> None:
    total, grad_y, x = operands(dtype)
    torch.library.opcheck(torch.ops.megatron_aquila.accumulate_weight_gradient_.default, (total.clone(), grad_y, x))

    def twice(total: torch.Tensor, grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        accumulate_weight_gradient_(total, grad_y, x)
        accumulate_weight_gradient_(total, 2 * grad_y, x)
        return total.sum()

    graphs = []

    def backend(graph, _inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled, eager = total.clone(), total.clone()
    sums = torch.compile(twice, backend=backend, fullgraph=True)(compiled, grad_y, x), twice(eager, grad_y, x)
    assert torch.equal(compiled, eager)
    assert torch.equal(*sums)
    assert not torch.equal(eager, total)
    (graph,) = graphs
    assert graph.count(torch.ops.megatron_aquila.accumulate_weight_gradient_) == 2, "it stays one op"


def test_without_values_the_shape_is_still_checked() -> None:
    total, grad_y, x = (tensor.to("meta") for tensor in operands(torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(AssertionError, match=r"is \(5, 7\), not \(7, 5\)"):
        torch.ops.megatron_aquila.accumulate_weight_gradient_(total.T, grad_y, x)
