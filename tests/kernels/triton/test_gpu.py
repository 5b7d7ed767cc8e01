"""On a GPU: Aquila's own sizes. What other files interpret on a CPU they run compiled there."""

import pytest
import torch

from megatron_aquila.kernels.cross_entropy import (
    softmax_gradient_,
    softmax_gradient_triton_,
    softmax_statistics,
    softmax_statistics_triton,
)
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels
from megatron_aquila.kernels.rms_norm import rms_norm_reference, rms_norm_triton
from megatron_aquila.kernels.self_check import Sizes, why_refused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
OPS = [op for op, names in IMPLEMENTATIONS.items() if "triton" in names]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", ["aquila", "llama"])
@pytest.mark.parametrize(("hidden_size", "ffn_size"), [(4096, 11008), (6144, 24576), (8192, 28672)])
def test_aquilas_sizes(op: str, dtype: torch.dtype, order, hidden_size: int, ffn_size: int) -> None:
    sizes = Sizes(hidden_size=hidden_size, ffn_size=ffn_size, head_dim=128, norm_order=order)
    assert why_refused(op, IMPLEMENTATIONS[op]["triton"], device=CUDA, dtype=dtype, sizes=sizes) is None


def test_they_are_the_default_once_tried() -> None:
    kernels = choose_kernels(CUDA, torch.bfloat16)
    assert all(getattr(kernels, op) is IMPLEMENTATIONS[op]["triton"] for op in OPS)


def test_more_elements_than_an_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(2**31 // 8192 + 5, 8192, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(8192, device=CUDA, dtype=torch.bfloat16)
    y = rms_norm_triton(x, weight, eps=1e-5, order="aquila")
    last = rms_norm_reference(x[-3:], weight, eps=1e-5, order="aquila")
    torch.testing.assert_close(y[-3:], last, rtol=2**-7, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(8192, 100096), (8192, 25024), (2**31 // 100096 + 5, 100096)])
def test_the_loss_of_a_7bs_chunk(rows: int, columns: int) -> None:
    """Of one rank, of one of four, and of more logits than an int32 counts; the last rows against the reference."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.randn(rows, columns, device=CUDA, dtype=torch.bfloat16)
    labels = torch.randint(columns - 88, (rows,), device=CUDA), torch.ones(rows, dtype=torch.bool, device=CUDA)
    last, last_labels = logits[-3:].clone(), (labels[0][-3:], labels[1][-3:])
    found = softmax_statistics_triton(logits, *labels, num_real=columns - 88, with_top=True)
    expected = softmax_statistics(last, *last_labels, num_real=columns - 88, with_top=True)
    torch.testing.assert_close(found[:, -3:], expected, rtol=1e-5, atol=0)
    weights = torch.rand(rows, device=CUDA)
    softmax_gradient_triton_(logits, *labels, found[0], weights, num_real=columns - 88)
    softmax_gradient_(last, *last_labels, expected[0], weights[-3:], num_real=columns - 88)
    torch.testing.assert_close(logits[-3:], last, rtol=2**-7, atol=0)
