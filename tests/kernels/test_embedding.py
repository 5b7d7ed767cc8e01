import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Record(TorchDispatchMode):
    """Remembers operations on tensors: the type of its first argument, the size of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor):
            self.calls.append((func.overloadpacket.__name__, args[0].dtype, out.numel()))
        return out


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_rows_are_summed_wide_and_the_table_is_never_copied(wide: torch.dtype) -> None:
    """A GPU rounds sums of bfloat16 rows too, so what counts is the type that the kernel is given."""
    dtype = torch.bfloat16 if wide is torch.float32 else wide
    weight, ids = torch.zeros(50, 4, dtype=dtype, requires_grad=True), torch.randint(50, (3, 2))
    with Record() as forward:
        x = embedding(ids, weight)
    assert all(size <= x.numel() for _, _, size in forward.calls)
    with Record() as backward:
        x.sum().backward()
    assert [given for name, given, _ in backward.calls if name == "embedding_dense_backward"] == [wide]
