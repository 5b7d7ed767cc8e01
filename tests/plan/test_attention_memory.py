"""The widest moment of attention's backward, planned and traced on tensors without data."""

from functools import partial

import pytest
import torch

from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.blocks import BLOCKS_FLASH
from megatron_aquila.model.position import rank_scores
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.ulysses import UlyssesAttention
from megatron_aquila.plan.attention_memory import attention_moment
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.dry import META, StorageTracker, fake_world

KINDS = {
    "plain": {},
    "alibi": {"position_embedding": "alibi"},
    "clamp": {"score_clamp": 9.0},
    "two ranges": {"rope_scaling": "two-range", "rope_factor": 4.0},
    "two ranges and clamp": {"rope_scaling": "two-range", "rope_factor": 4.0, "score_clamp": 9.0},
}
LONG = 16384  # whose scores are taken in several blocks


def shape_of(kind: str, seq_len: int, kv_heads: int) -> ModelShape:
    sizes = {"num_layers": 1, "hidden_size": 512, "ffn_size": 64, "vocab_size": 64, "padded_vocab_size": 64}
    heads = {"num_heads": 8, "num_kv_heads": kv_heads, "head_dim": 64}
    return ModelShape(**sizes, **heads, seq_len=seq_len, rope_trained_len=seq_len // 4, **KINDS[kind])


def traced(shape: ModelShape, cp: int, method: str) -> int:
    """Most bytes of a backward beyond those before it, in bfloat16."""
    with fake_world(cp - 1, cp), StorageTracker() as storages:
        ctx = ParallelContext.create(RankGrid(cp=cp), META)
        scores = rank_scores(shape, ctx.tp)
        attend = kernel = SCORE_BLOCKS if scores is not None and scores.alters else BLOCKS_FLASH
        if cp > 1 and method == "ring":
            attend = RingAttention(cp=ctx.cp, kernel=kernel, overlap=True)
        elif cp > 1:
            attend = UlyssesAttention(cp=ctx.cp, attention=kernel)
        q, k, v = (
            torch.empty(shape.seq_len // cp, 1, heads, 64, dtype=torch.bfloat16, device=META, requires_grad=True)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        o = (attend if scores is None else partial(attend, scores=scores))(q, k, v)
        before = storages.peak = storages.live
        grads = torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
        return storages.peak - before


@pytest.mark.parametrize(
    ("kind", "cp", "method", "seq_len", "kv_heads", "most"),
    [
        ("plain", 2, "ring", 2048, 8, 1.01),
        ("plain", 4, "ring", LONG, 2, 1.01),
        ("alibi", 1, "ring", LONG, 2, 1.01),
        ("alibi", 2, "ring", 2048, 8, 1.03),
        ("alibi", 4, "ring", LONG, 2, 1.01),
        ("alibi", 2, "ulysses", LONG, 2, 1.01),
        ("clamp", 4, "ring", 2048, 8, 1.04),
        ("clamp", 2, "ulysses", 2048, 2, 1.01),
        ("two ranges", 1, "ring", 2048, 2, 1.03),
        ("two ranges", 2, "ring", LONG, 2, 1.01),
        ("two ranges", 4, "ring", 2048, 8, 1.04),
        ("two ranges", 2, "ulysses", 2048, 8, 1.04),
        ("two ranges and clamp", 1, "ring", 2048, 2, 1.03),
        ("two ranges and clamp", 1, "ring", LONG, 2, 1.04),
        ("two ranges and clamp", 2, "ring", LONG, 2, 1.04),
        ("two ranges and clamp", 2, "ring", 2048, 8, 1.08),
    ],
)
def test_the_planned_moment_is_the_traced_one(
    kind: str, cp: int, method: str, seq_len: int, kv_heads: int, most: float
) -> None:
    shape = shape_of(kind, seq_len, kv_heads)
    planned = attention_moment(shape, RankGrid(cp=cp), micro_batch=1, item=2, wide=4, context_method=method)
    assert 0.99 <= planned / traced(shape, cp, method) <= most


def test_whole_samples_of_fused_attention_are_its_own_affair() -> None:
    settings = {"micro_batch": 1, "item": 2, "wide": 4}
    assert attention_moment(shape_of("plain", 2048, 2), RankGrid(), **settings, context_method="ring") == 0
    assert attention_moment(shape_of("plain", 2048, 2), RankGrid(cp=2), **settings, context_method="ulysses") == 0
