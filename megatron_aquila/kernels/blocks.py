"""Attention of a block of queries over a block of keys, by torch's fused kernels and in plain PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.parts import (
    Block,
    Grads,
    Meeting,
    MeetingKernel,
    Part,
    attention_in_blocks,
    document_spans,
    square,
)
from megatron_aquila.kernels.precision import compute_dtype, multiplies_widened
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.kernels.two_range import TwoRangeBlocks


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """``forward(q_SBND, k_TBKD, v_TBKD, is_causal)`` is a ``Part``, ``backward(grad_o, q, k, v, o, lse, is_causal)``
    its ``Grads``. Causal blocks have as many keys as queries. ``lse`` is in ``compute_dtype``, all else in the type of
    q or wider.

    As a ``CausalAttention`` it is a ring on one process: what self-checks and tests run, and far and near pairs need.
    """

    forward: Callable[..., Part]
    backward: Callable[..., Grads]

    def __call__(
        self,
        q_SBND: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        documents: Documents | None = None,
        *,
        scores: Scores = Scores(),
    ) -> Tensor:
        """``causal_attention_reference``, each document in three blocks, or whole where its pairs are near and far."""
        spans = list(document_spans(q_SBND, documents))
        blocks = [square(*span) for span in spans]
        if scores.ranges is None:
            blocks = [block for span in spans for block in _halves(*span)]
        return attention_in_blocks(q_SBND, k_SBKD, v_SBKD, self.of(scores), blocks)

    def of(self, scores: Scores) -> MeetingKernel:
        """This kernel for pairs that are near and far, if ``scores`` say so."""
        assert not scores.alters, f"a fused kernel gives no scores to alter: {scores}"
        return self if scores.ranges is None else TwoRangeBlocks(self, scores.ranges)

    def attend(self, q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, meeting: Meeting) -> Part:
        """As of ``MeetingKernel``: where the tokens lie is nothing to it."""
        return self.forward(q_SBND, k_TBKD, v_TBKD, meeting.is_causal)

    def add_gradients_(
        self,
        grads: Grads,
        grad_o: Tensor,
        q_SBND: Tensor,
        k_TBKD: Tensor,
        v_TBKD: Tensor,
        o: Tensor,
        lse_SBN: Tensor,
        meeting: Meeting,
    ) -> None:
        """As of ``MeetingKernel``."""
        found = self.backward(grad_o, q_SBND, k_TBKD, v_TBKD, o, lse_SBN, meeting.is_causal)
        for total, part in zip(grads, found, strict=True):
            total += part


def _halves(samples: slice, places: range) -> Iterator[Block]:
    """A document in three blocks: tail, head, tail with head."""
    middle = (places.start + places.stop) // 2
    head, tail = range(places.start, middle), range(middle, places.stop)
    yield square(samples, tail)
    if head:
        yield square(samples, head)
        both = Meeting(is_causal=False, queries=(tail,), keys=(head,))
        yield Block(samples, slice(tail.start, tail.stop), slice(head.start, head.stop), both)


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
