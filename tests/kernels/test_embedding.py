import pytest
import torch

from megatron_aquila.kernels.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_copied_exactly(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(7, 4, dtype=dtype), torch.randint(7, (5, 2))
    assert torch.equal(embedding(ids, weight), weight[ids])


def test_a_frequent_tokens_gradient_is_not_lost_in_bfloat16() -> None:
    """1000 times 1 is 1000; summed in bfloat16 it would stop at 256, where adding 1 changes nothing."""
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((1000,), 2)
    (ours,) = torch.autograd.grad(embedding(ids, weight).sum(), weight)
    assert torch.equal(ours, torch.tensor([0, 0, 1000]).bfloat16()[:, None].expand(3, 4))
    (naive,) = torch.autograd.grad(torch.nn.functional.embedding(ids, weight).sum(), weight)
    assert naive[2].max() == 256
