"""Attention of a block of queries over a block of keys: a part of a softmax, and how parts are put together.

A part gives its output ``o`` and ``lse``, each query's logarithm of the sum of the exponentials of its scores. Parts
are merged in ``compute_dtype``: ``o = sum(o_i exp(lse_i - lse))`` with ``lse = log(sum(exp(lse_i)))``. Backward takes
the merged ``o`` and ``lse`` and gives each block's share of the gradients, which are sums over the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import apply, compute_dtype, multiplies_widened

Part = tuple[Tensor, Tensor]  # o_SBND and lse_SBN
Grads = tuple[Tensor, Tensor, Tensor]  # of q_SBND, k_SBKD and v_SBKD


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """``forward(q_SBND, k_TBKD, v_TBKD, is_causal)`` is a ``Part``, ``backward(grad_o, q, k, v, o, lse, is_causal)``
    its ``Grads``. Causal blocks have as many keys as queries. ``lse`` is in ``compute_dtype``, all else in the type of
    q or wider.

    As a ``CausalAttention`` it is a ring on one process: what self-checks and tests run.
    """

    forward: Callable[..., Part]
    backward: Callable[..., Grads]

    def __call__(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
        """``causal_attention_reference``, each document in three blocks."""
        return apply(_InBlocks, q_SBND, k_SBKD, v_SBKD, self, documents)


def empty_sum(q_SBND: Tensor) -> Part:
    """The part that has no keys: what others are merged into."""
    wide = compute_dtype(q_SBND.dtype)
    return q_SBND.new_zeros(q_SBND.shape, dtype=wide), q_SBND.new_full(q_SBND.shape[:-1], -torch.inf, dtype=wide)


def merge_(total: Part, part: Part) -> None:
    """Add the keys of ``part`` to those of ``total``, of the same queries, in place."""
    (o, lse), (o_part, lse_part) = total, part
    merged = torch.logaddexp(lse, lse_part)
    o.mul_((lse - merged).exp_().unsqueeze(-1)).add_(o_part * (lse_part - merged).exp_().unsqueeze(-1))
    lse.copy_(merged)


def _blocks(length: int, num_samples: int, documents: Documents | None) -> list[tuple[slice, slice, slice, bool]]:
    """Samples, queries and keys of three blocks a document, and whether they are causal: head, tail, tail with head."""
    bounds = (0, length) if documents is None else documents.bounds
    found = []
    for start, stop in pairwise(bounds):
        sample, start = divmod(start, length)
        samples = slice(0, num_samples) if documents is None else slice(sample, sample + 1)
        stop -= sample * length
        middle = (start + stop) // 2
        head, tail = slice(start, middle), slice(middle, stop)
        found.append((samples, tail, tail, True))
        if start < middle:
            found += [(samples, head, head, True), (samples, tail, head, False)]
    return found


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: BlockAttention, documents: Documents | None
    ) -> Tensor:
        total = o, lse = empty_sum(q)
        ctx.blocks, ctx.kernel = _blocks(q.shape[0], q.shape[1], documents), kernel
        for samples, rows, keys, is_causal in ctx.blocks:
            part = kernel.forward(q[rows, samples], k[keys, samples], v[keys, samples], is_causal)
            merge_((total[0][rows, samples], total[1][rows, samples]), part)
        ctx.save_for_backward(q, k, v, out := o.to(q.dtype), lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
        for samples, rows, keys, is_causal in ctx.blocks:
            of_queries = (x[rows, samples] for x in (grad_o, q))
            of_keys = (x[keys, samples] for x in (k, v))
            sums = (x[rows, samples] for x in (o, lse))
            found = ctx.kernel.backward(*of_queries, *of_keys, *sums, is_causal)
            for grad, place, part in zip(grads, (rows, keys, keys), found, strict=True):
                grad[place, samples] += part
        return *(grad.to(q.dtype) for grad in grads), None, None


def _reference(q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, is_causal: bool) -> Part:
    scores, _, v_TBKD = _scores(q_SBND, k_TBKD, v_TBKD, is_causal)
    lse = scores.logsumexp(-1)
    o = torch.einsum("bkgst,tbkd->sbkgd", (scores - lse.unsqueeze(-1)).exp(), v_TBKD)
    return o.flatten(2, 3), lse.permute(3, 0, 1, 2).flatten(2)


def _reference_backward(
    grad_o: Tensor, q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, o: Tensor, lse_SBN: Tensor, is_causal: bool
) -> Grads:
    scores, k, v = _scores(q_SBND, k_TBKD, v_TBKD, is_causal)
    size, wide = (k.shape[2], -1), scores.dtype
    q, grad_o = (torch.unflatten(x.to(wide), 2, size) for x in (q_SBND, grad_o))
    probs = (scores - torch.unflatten(lse_SBN, 2, size).permute(1, 2, 3, 0).unsqueeze(-1)).exp()
    grad_v = torch.einsum("bkgst,sbkgd->tbkd", probs, grad_o)
    delta = (grad_o * torch.unflatten(o.to(wide), 2, size)).sum(-1).permute(1, 2, 3, 0)
    grad_scores = probs * (torch.einsum("sbkgd,tbkd->bkgst", grad_o, v) - delta.unsqueeze(-1))
    grad_scores = grad_scores * q_SBND.shape[-1] ** -0.5
    grad_q = torch.einsum("bkgst,tbkd->sbkgd", grad_scores, k).flatten(2, 3)
    return grad_q, torch.einsum("bkgst,sbkgd->tbkd", grad_scores, q), grad_v


def _scores(q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, is_causal: bool) -> Grads:
    """Scaled and masked scores (B, K, N / K, S, T), and the keys and values widened."""
    wide = compute_dtype(q_SBND.dtype)
    q, k, v = (x.to(wide) for x in (q_SBND, k_TBKD, v_TBKD))
    scores = torch.einsum("sbkgd,tbkd->bkgst", torch.unflatten(q, 2, (k.shape[2], -1)), k) * q.shape[-1] ** -0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores, k, v


def _cpu(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Part:
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_widened(q, k, v), 0.0, is_causal)
    return o.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _cpu_backward(grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool) -> Grads:
    grad_o, q, k, v, o = _widened(grad_o, q, k, v, o)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_o, q, k, v, o, lse.permute(1, 2, 0), 0.0, is_causal
    )
    grad_q, grad_k, grad_v = (grad.permute(2, 0, 1, 3) for grad in grads)
    return grad_q, grad_k, grad_v


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Part:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    o, lse, *_ = op(*_widened(q, k, v), 0.0, is_causal)
    return o.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _flash_backward(grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool) -> Grads:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *_widened(grad_o, q, k, v, o),
        lse.permute(1, 2, 0).contiguous(),
        *(None, None, q.shape[0], k.shape[0], 0.0, is_causal),
        *(seed, seed.new_empty(())),
    )
    grad_q, grad_k, grad_v = (grad.permute(2, 0, 1, 3) for grad in grads)
    return grad_q, grad_k, grad_v


def _efficient(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Part:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # it knows no grouped heads
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    o, lse, *_ = op(*_widened(q, k, v), None, True, 0.0, is_causal)
    return o.permute(2, 0, 1, 3), lse[..., : q.shape[0]].permute(2, 0, 1)  # it pads the queries


def _efficient_backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool
) -> Grads:
    num_kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    grad_o, q, k, v, o = _widened(grad_o, q, k, v, o)
    # Of a padded query, whose sum is infinite, no key gets anything.
    lse = F.pad(lse.permute(1, 2, 0), (0, -lse.shape[0] % 32), value=torch.inf).contiguous()
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_o, q, k, v, None, o, lse, seed, seed, 0.0, [True, True, True, False], is_causal
    )
    grad_q, grad_k, grad_v = (grad.permute(2, 0, 1, 3) for grad in grads[:3])
    grad_k, grad_v = (torch.unflatten(grad, 2, (num_kv_heads, group)).sum(3) for grad in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def _widened(*tensors: Tensor) -> list[Tensor]:
    """SBND -> BNSD, in the type that products are taken in."""
    wide = compute_dtype(tensors[0].dtype) if multiplies_widened(tensors[0]) else tensors[0].dtype
    return [x.permute(1, 2, 0, 3).to(wide) for x in tensors]


BLOCKS_REFERENCE = BlockAttention(_reference, _reference_backward)
BLOCKS_CPU = BlockAttention(_cpu, _cpu_backward)  # torch's flash attention for CPUs
BLOCKS_FLASH = BlockAttention(_flash, _flash_backward)  # torch's flash attention 2; half precision on a GPU only
BLOCKS_EFFICIENT = BlockAttention(_efficient, _efficient_backward)  # on a GPU, in float32 too
