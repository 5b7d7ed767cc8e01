from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.blocks import (
    BLOCKS_CPU,
    BLOCKS_EFFICIENT,
    BLOCKS_FLASH,
    BLOCKS_REFERENCE,
)
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.parts import empty_sum, merge_
from megatron_aquila.kernels.self_check import Sizes, why_refused

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


def not_merged(q, k, v, is_causal):
    o, lse = BLOCKS_CPU.forward(q, k, v, is_causal)
    return o, torch.zeros_like(lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_self_checks_know_right_from_wrong(documents, dtype):
    """What every such kernel must pass on a GPU before it is chosen there."""
    check = partial(
        why_refused,
        "attention",
        device=torch.device("cpu"),
        dtype=dtype,
        sizes=Sizes(has_documents=documents, by_blocks=True),
    )
    for kernel in KERNELS.values():
        assert check(kernel) is None
    assert "is wrong in" in check(replace(BLOCKS_CPU, forward=not_merged))
    assert "is wrong in" in check(
        replace(BLOCKS_CPU, backward=lambda *inputs: BLOCKS_CPU.backward(*inputs[:-1], False))
    )


@pytest.mark.parametrize("kernel", [BLOCKS_FLASH, BLOCKS_EFFICIENT], ids=["flash", "efficient"])
def test_torch_takes_what_is_called_on_a_gpu(kernel):
    """Without a GPU: shapes and arguments of the operators, whose values are for the self-check there."""
    q, k, v = (torch.empty(10, 2, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (6, 2, 2))
    for rows, is_causal in ((10, True), (7, False)):
        o, lse = kernel.forward(q[:rows], k, v, is_causal)
        assert (o.shape, lse.shape, lse.dtype) == (q[:rows].shape, q[:rows].shape[:-1], torch.float32)
        grads = kernel.backward(o, q[:rows], k, v, o, lse, is_causal)
        assert [grad.shape for grad in grads] == [q[:rows].shape, k.shape, v.shape]
