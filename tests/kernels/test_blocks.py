import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.blocks import BLOCKS_CPU, BLOCKS_REFERENCE, BlockAttention, empty_sum, merge_
from megatron_aquila.kernels.documents import Documents

BOUNDS = (0, 1, 5, 12, 24)
KERNELS = {"reference": BLOCKS_REFERENCE, "cpu": BLOCKS_CPU}


def qkv(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(12, 2, heads, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (6, 2, 2)
    ]


def outcome(kernel, tensors, documents):
    o = kernel(*tensors, documents)
    grads = torch.autograd.grad(
        o, tensors, torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o).to(o.dtype)
    )
    return [o.detach(), *grads]


@pytest.mark.parametrize("documents", [None, Documents(BOUNDS, torch.tensor(BOUNDS, dtype=torch.int32))])
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_make_up_the_whole(name, documents):
    expected = outcome(causal_attention_reference, qkv(), documents)
    for ours, theirs in zip(outcome(KERNELS[name], qkv(), documents), expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-14 * theirs.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_merged_in_float32(name):
    """Rounded once at the end: no worse than the exact result rounded, but for float32's own sums."""
    tensors = qkv(torch.bfloat16)
    expected = outcome(causal_attention_reference, [x.detach().double().requires_grad_() for x in tensors], None)
    for ours, theirs in zip(outcome(KERNELS[name], tensors, None), expected, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours.double() - theirs).norm() <= 2**-8 * theirs.norm()


def test_a_merge_that_does_not_rescale_is_seen():
    q, k, v = (x.detach() for x in qkv())
    total, wrong = empty_sum(q), torch.zeros_like(q)
    for keys in (slice(0, 5), slice(5, 12)):
        part = BLOCKS_REFERENCE.forward(q, k[keys], v[keys], False)
        merge_(total, part)
        wrong += part[0] / 2
    whole, lse = BLOCKS_REFERENCE.forward(q, k, v, False)
    assert torch.allclose(total[0], whole, rtol=1e-13, atol=1e-13)
    assert torch.allclose(total[1], lse, rtol=1e-13)
    assert (wrong - whole).norm() > 0.1 * whole.norm()


def test_a_part_without_keys_changes_nothing():
    q, k, v = (x.detach() for x in qkv())
    part = BLOCKS_REFERENCE.forward(q, k, v, True)
    total = empty_sum(q)
    merge_(total, part)
    assert torch.equal(total[0], part[0])
    assert torch.equal(total[1], part[1])


def test_it_is_a_kernel_like_others():
    assert isinstance(BLOCKS_CPU, BlockAttention)
    q, k, v = qkv()
    assert BLOCKS_CPU(q, k, v).shape == q.shape
