"""Attention over a split sequence, in both ways, against attention over the whole one."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention, causal_attention_reference
from megatron_aquila.kernels.blocks import BLOCKS_CPU, BLOCKS_REFERENCE
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.ulysses import UlyssesAttention
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.sequence import num_shared_heads, shard_pieces
from tests.parallel.worlds import CPU, distance, on_ranks

BOUNDS = (0, 1, 5, 22, 24, 32, 64)  # of two samples of 32 tokens
APART = Documents(BOUNDS, torch.tensor(BOUNDS, dtype=torch.int32))


@functools.cache
def cp_group(size: int) -> Group:
    return ParallelContext.create(RankGrid(cp=size), CPU).cp


def core(method: str, size: int, *, overlap: bool = True, plain: bool = False) -> RingAttention | UlyssesAttention:
    cp = cp_group(size)
    if method == "ring":
        return RingAttention(cp=cp, kernel=BLOCKS_REFERENCE if plain else BLOCKS_CPU, overlap=overlap)
    return UlyssesAttention(cp=cp, attention=causal_attention_reference if plain else causal_attention)


def inputs(kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v of whole samples and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    heads = (12, kv_heads, kv_heads, 12)
    return [torch.randn(32, 2, n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in heads]


def sharded(size, method, kv_heads, documents, settings=None, dtype=torch.float64):
    """Output and gradients of this rank's tokens, and which they are."""
    cp = cp_group(size)
    held = [t for piece in shard_pieces(32, cp=size, rank=cp.rank, method=method) for t in piece]
    q, k, v, grad = (x[held].requires_grad_() for x in inputs(kv_heads, dtype))
    o = core(method, size, **(settings or {}))(q, k, v, documents)
    return held, [o.detach(), *torch.autograd.grad(o, (q, k, v), grad.detach())]


def sharded_all(size, method, kv_heads, documents):
    return [sharded(size, method, count, documents) for count in kv_heads]


def joined(parts):
    """The ranks' tokens in their order in the sample."""
    order = torch.tensor([token for held, _ in parts for token in held]).argsort()
    return [torch.cat(shares)[order] for shares in zip(*(found for _, found in parts), strict=True)]


def expected(kv_heads, documents):
    q, k, v, grad = inputs(kv_heads)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = causal_attention_reference(*leaves, documents)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


@pytest.mark.parametrize("documents", [None, APART], ids=["whole", "apart"])
@pytest.mark.parametrize(("method", "size"), [("ring", 2), ("ring", 4), ("ulysses", 2), ("ulysses", 4)])
def test_a_split_sequence_attends_as_the_whole(method, size, documents, pool):
    """Three key/value heads on two or four ranks are copied twice or four times: gradients sum over the copies."""
    kv_heads = (1, 2, 3, 4, 12)
    by_rank = on_ranks(pool, size, sharded_all, method, kv_heads, documents)
    for count, parts in zip(kv_heads, zip(*by_rank, strict=True), strict=True):
        for ours, theirs in zip(joined(parts), expected(count, documents), strict=True):
            assert distance(ours, theirs) < 1e-14


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_the_plain_kernels_do_the_same(method, pool):
    found = joined(on_ranks(pool, 2, sharded, method, 2, APART, {"plain": True}))
    assert max(distance(*pair) for pair in zip(found, expected(2, APART), strict=True)) < 1e-14


def test_overlap_changes_no_bit(pool):
    ways = [joined(on_ranks(pool, 4, sharded, "ring", 2, APART, {"overlap": overlap})) for overlap in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(*ways, strict=True))


def test_bfloat16_is_summed_in_float32(pool):
    """Forward is rounded once, however many ranks; gradients by each kernel's call, then merged in float32."""
    found = joined(on_ranks(pool, 4, sharded, "ring", 2, None, {}, torch.bfloat16))
    assert found[0].dtype is torch.bfloat16
    q, k, v, grad = (x.bfloat16().double().requires_grad_() for x in inputs(2))
    o = causal_attention_reference(q, k, v)
    exact = [o, *torch.autograd.grad(o, (q, k, v), grad)]
    assert max(distance(*pair) for pair in zip(found, exact, strict=True)) < 2**-8


def test_a_world_of_one_is_ordinary_attention():
    for method in ("ring", "ulysses"):
        held, found = sharded(1, method, 2, APART, {})
        assert held == list(range(32))
        assert max(distance(*pair) for pair in zip(found, expected(2, APART), strict=True)) < 1e-14


def counted(size, method, settings):
    from megatron_aquila.verify.dry import CallRecorder

    with CallRecorder() as recorder:
        sharded(size, method, 2, None, settings)
    return Counter((call.kind, call.num_bytes) for call in recorder.calls)


def test_what_is_said(pool):
    """Of 4 ranks each sends 3 shards of k and v forward, 3 backward, and 4 of their gradients; or 4 all-to-alls."""
    shard = 2 * 8 * 2 * 2 * 8 * 8
    for overlap in (True, False):
        for found in on_ranks(pool, 4, counted, "ring", {"overlap": overlap}):
            assert found == {("send", shard): 6 + 4, ("receive", shard): 6 + 4}
    tokens = 8 * 2 * 8 * 8  # of one head
    for found in on_ranks(pool, 4, counted, "ulysses", {}):
        assert found == {("all-to-all", (12 + 2 * 4) * tokens): 2, ("all-to-all", 12 * tokens): 2}


def test_heads_that_every_rank_gets():
    assert [num_shared_heads(*pair) for pair in ((8, 2), (2, 8), (6, 4), (1, 3))] == [8, 8, 12, 3]


def test_a_bug_would_be_seen():
    """What a ring must not do: leave out a shard, or take its mask for another's."""
    ring = core("ring", 1)
    other = replace(ring, cp=Group("cp", 1, 2, (0, 1), None))
    q = torch.zeros(16, 1, 1, 8)
    assert other.blocks(q, None, 0) != other.blocks(q, None, 1)
    assert [other.owner(step) for step in range(2)] == [1, 0]
