"""What the tests of all Triton kernels share: the device, random inputs, and outcomes against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[kernels]'")

# Compiled on a GPU, interpreted on a CPU, where Triton 3.6 to 3.9 cut float32 off to bfloat16 instead of rounding it.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS32 = torch.finfo(torch.float32).eps


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of rounding float32 to ``dtype``; float32 itself is counted where it is computed in."""
    return 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def outcome(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def exact(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """``outcome`` in float64."""
    return outcome(function, [x.double() for x in inputs], grad.double())


def worst(ours: Tensor, exact: Tensor, bound: Tensor) -> float:
    """Largest error as a share of what is allowed; infinite where something is not a number, or infinite wrongly."""
    assert ours.shape == exact.shape, f"{ours.shape} against {exact.shape}"
    if ours.numel() == 0:
        return 0.0
    tiny = torch.finfo(ours.dtype).tiny * torch.finfo(ours.dtype).eps + torch.finfo(torch.float32).tiny
    return ((ours.double() - exact).abs() / (bound + tiny)).nan_to_num(nan=torch.inf).max().item()
