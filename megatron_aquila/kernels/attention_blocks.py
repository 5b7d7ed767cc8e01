"""Attention whose scores may be biased and clamped: no fused kernel of torch does both, and none clamps."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.parts import (
    Grads,
    Meeting,
    MeetingKernel,
    Part,
    attention_in_blocks,
    document_spans,
    square,
)
from megatron_aquila.kernels.precision import apply, compute_dtype
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.kernels.two_range import TwoRangeBlocks, places_of

UNCHANGED = Scores()
MOST_SCORES = 2**26  # of a block: 256 MiB in float32


@dataclass(frozen=True, slots=True)
class ScoreBlocks:
    """Attention that takes a block of scores at a time, and in backward takes it again.

    Everything is computed in ``compute_dtype``; on a GPU half-precision products are summed in it. A ``MeetingKernel``
    that does to scores what ``scores`` says, and as a ``CausalAttention`` what it is told.
    """

    scores: Scores = UNCHANGED

    def __call__(
        self,
        q_SBND: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        documents: Documents | None = None,
        *,
        scores: Scores = Scores(),
    ) -> Tensor:
        """``causal_attention_reference``, rounded once."""
        if scores.ranges is not None:
            blocks = [square(*span) for span in document_spans(q_SBND, documents)]
            return attention_in_blocks(q_SBND, k_SBKD, v_SBKD, self.of(scores), blocks)
        numbers_BS = None if documents is None else documents.numbers_BS(q_SBND.shape[1])
        whole = range(q_SBND.shape[0])
        meeting = Meeting(is_causal=True, queries=(whole,), keys=(whole,))
        return apply(_Attention, q_SBND, k_SBKD, v_SBKD, _Wanted(scores, meeting, numbers_BS))

    def of(self, scores: Scores) -> MeetingKernel:
        """This kernel for ``scores``."""
        assert scores.slopes is None or scores.ranges is None, "where nothing turns no pair can turn further"
        kernel = replace(self, scores=replace(scores, ranges=None))
        return kernel if scores.ranges is None else TwoRangeBlocks(kernel, scores.ranges)

    def attend(self, q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, meeting: Meeting) -> Part:
        """As of ``MeetingKernel``."""
        o_SBND = torch.empty(q_SBND.shape, dtype=compute_dtype(q_SBND.dtype), device=q_SBND.device)
        return o_SBND, _attend_(o_SBND, q_SBND, k_TBKD, v_TBKD, _Wanted(self.scores, meeting))

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
        _add_gradients_(grads, grad_o, q_SBND, k_TBKD, v_TBKD, o, lse_SBN, _Wanted(self.scores, meeting))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which scores count, and what is done to them. ``numbers_BS``: the documents of tokens that meet themselves."""

    scores: Scores
    meeting: Meeting
    numbers_BS: Tensor | None = None

    def held(self, raw: Tensor, rows: range) -> Tensor:
        """What the softmax takes: clamped, biased, and of later or foreign tokens minus infinity.

        In the memory of ``raw`` if there is no clamp, whose gradient asks for it.
        """
        scores, columns = self.scores, raw.shape[-1]
        held = raw if scores.clamp is None else raw.clamp(-scores.clamp, scores.clamp)
        if scores.slopes is not None:
            queries_S, keys_T = (places_of(places, raw) for places in (self.meeting.queries, self.meeting.keys))
            apart_ST = keys_T[:columns] - queries_S[rows.start : rows.stop, None]
            slopes = scores.slopes_N11(raw)
            held.view(-1, len(slopes), *apart_ST.shape).addcmul_(slopes, apart_ST)
        if self.meeting.is_causal:
            query, key = (torch.arange(x.start, x.stop, device=raw.device) for x in (rows, range(columns)))
            by_row = held.view(held.shape[0], -1, len(rows), columns)
            by_row.masked_fill_(key[None, :] > query[:, None], float("-inf"))
        if self.numbers_BS is not None:
            foreign = self.numbers_BS[:, rows.start : rows.stop, None] != self.numbers_BS[:, None, :columns]
            by_sample = held.view(foreign.shape[0], -1, len(rows), columns)
            by_sample.masked_fill_(foreign[:, None], float("-inf"))
        return held


class _Attention(torch.autograd.Function):
    """Of whole samples. Saves its inputs, its output and of each query and head the log of the sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, wanted: _Wanted) -> Tensor:
        out_SBND = torch.empty(q_SBND.shape, dtype=q_SBND.dtype, device=q_SBND.device)
        lse_SBN = _attend_(out_SBND, q_SBND, k_SBKD, v_SBKD, wanted)
        ctx.save_for_backward(q_SBND, k_SBKD, v_SBKD, out_SBND, lse_SBN)
        ctx.wanted = wanted
        return out_SBND

    @staticmethod
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_SBND, lse_SBN = ctx.saved_tensors
        # a query is in one block, and rounded once; a key is in many
        grad_q, (grad_k, grad_v) = torch.zeros_like(q), (torch.zeros_like(x, dtype=lse_SBN.dtype) for x in (k, v))
        _add_gradients_((grad_q, grad_k, grad_v), grad_SBND, q, k, v, out_SBND, lse_SBN, ctx.wanted)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _attend_(out_SBND: Tensor, q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, wanted: _Wanted) -> Tensor:
    """Fills ``out_SBND``, rounding once; returns lse_SBN."""
    assert q_SBND.shape[2] % k_TBKD.shape[2] == 0, f"{q_SBND.shape[2]} query heads, {k_TBKD.shape[2]} of keys"
    lse_SBN = torch.empty(q_SBND.shape[:3], dtype=compute_dtype(q_SBND.dtype), device=q_SBND.device)
    for rows, stop in _blocks(q_SBND, k_TBKD, wanted):
        held = wanted.held(_raw_scores(q_SBND, k_TBKD, rows, stop), rows)
        log_sum = held.logsumexp(-1, keepdim=True)
        weights = held.sub_(log_sum).exp_()
        out = _product(weights.to(_narrow(v_TBKD)), _keys(v_TBKD, stop))
        out_SBND[rows.start : rows.stop] = _rows_first(out, q_SBND, len(rows))
        lse_SBN[rows.start : rows.stop] = _rows_first(log_sum, q_SBND, len(rows)).squeeze(-1)
    return lse_SBN


def _add_gradients_(
    grads: Grads,
    grad_SBND: Tensor,
    q_SBND: Tensor,
    k_TBKD: Tensor,
    v_TBKD: Tensor,
    out_SBND: Tensor,
    lse_SBN: Tensor,
    wanted: _Wanted,
) -> None:
    grad_q, grad_k, grad_v = grads
    wide, clamp = lse_SBN.dtype, wanted.scores.clamp
    for rows, stop in _blocks(q_SBND, k_TBKD, wanted):
        raw = _raw_scores(q_SBND, k_TBKD, rows, stop)
        weights = wanted.held(raw, rows).sub_(_grouped(lse_SBN.unsqueeze(-1), k_TBKD, rows)).exp_()
        grad_out, out = (_grouped(x, k_TBKD, rows) for x in (grad_SBND, out_SBND))
        grad_v[:stop] += _keys_first(_product(weights.to(_narrow(v_TBKD)).mT, grad_out), k_TBKD)
        mean = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        grad_raw = _product(grad_out, _keys(v_TBKD, stop).mT).sub_(mean).mul_(weights)
        del weights
        if clamp is not None:
            grad_raw.mul_(raw.abs_() <= clamp)
        del raw
        grad_raw = grad_raw.mul_(q_SBND.shape[-1] ** -0.5).to(_narrow(q_SBND))
        grad_q[rows.start : rows.stop] += _rows_first(_product(grad_raw, _keys(k_TBKD, stop)), q_SBND, len(rows))
        grad_k[:stop] += _keys_first(_product(grad_raw.mT, _grouped(q_SBND, k_TBKD, rows)), k_TBKD)
        del grad_raw


def _blocks(q_SBND: Tensor, k_TBKD: Tensor, wanted: _Wanted) -> Iterator[tuple[range, int]]:
    """The queries, block by block: as many as have ``MOST_SCORES`` scores; and how many of the keys they may see."""
    (num_queries, num_samples, num_heads, _), num_keys = q_SBND.shape, k_TBKD.shape[0]
    step = max(1, min(num_queries, MOST_SCORES // (num_samples * num_heads * num_keys)))
    for start in range(0, num_queries, step):
        rows = range(start, min(start + step, num_queries))
        yield rows, rows.stop if wanted.meeting.is_causal else num_keys


def _grouped(x_SBND: Tensor, k_TBKD: Tensor, rows: range) -> Tensor:
    """Queries ``rows`` by key head: (B * K, heads of the group * rows, D)."""
    num_samples, num_groups, size = *k_TBKD.shape[1:3], x_SBND.shape[3]
    block = x_SBND[rows.start : rows.stop].permute(1, 2, 0, 3)
    return block.reshape(num_samples * num_groups, -1, size)


def _rows_first(x: Tensor, like_SBND: Tensor, num_rows: int) -> Tensor:
    """``_grouped`` undone: (rows, B, N, D)."""
    _, num_samples, num_heads, _ = like_SBND.shape
    return x.view(num_samples, num_heads, num_rows, -1).permute(2, 0, 1, 3)


def _keys(k_TBKD: Tensor, stop: int) -> Tensor:
    """The keys up to ``stop``: (B * K, T, D)."""
    return k_TBKD[:stop].permute(1, 2, 0, 3).flatten(0, 1)


def _keys_first(x: Tensor, like_TBKD: Tensor) -> Tensor:
    """``_keys`` undone."""
    return x.view(*like_TBKD.shape[1:3], *x.shape[1:]).permute(2, 0, 1, 3)


def _raw_scores(q_SBND: Tensor, k_TBKD: Tensor, rows: range, stop: int) -> Tensor:
    """Scaled scores in ``compute_dtype``, (B * K, heads of the group * rows, T)."""
    product = _product(_grouped(q_SBND, k_TBKD, rows), _keys(k_TBKD, stop).mT)
    return product.mul_(q_SBND.shape[-1] ** -0.5)


def _narrow(x: Tensor) -> torch.dtype:
    """What is multiplied with ``x``: on a GPU tensors of its own type, elsewhere of the wide one."""
    return x.dtype if x.device.type == "cuda" else compute_dtype(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The batch of products in ``compute_dtype``; only CUDA multiplies 16-bit tensors into a float32 result."""
    wide = compute_dtype(b.dtype)
    if a.dtype is b.dtype and a.dtype is not wide and a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))


SCORE_BLOCKS = ScoreBlocks()
