"""Attention whose scores may be biased and clamped: no fused kernel of torch does both, and none clamps."""

from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import apply, compute_dtype
from megatron_aquila.kernels.scores import Scores

MOST_SCORES = 2**26  # of a block: 256 MiB in float32


def causal_attention_blocks(
    q_SBND: Tensor,
    k_SBKD: Tensor,
    v_SBKD: Tensor,
    documents: Documents | None = None,
    *,
    scores: Scores = Scores(),
) -> Tensor:
    """``causal_attention_reference``, a block of queries at a time; a block's scores are computed again in backward.

    Everything is computed in ``compute_dtype`` and rounded once; on a GPU half-precision products are summed in it.
    """
    assert q_SBND.shape[2] % k_SBKD.shape[2] == 0, f"{q_SBND.shape[2]} query heads, {k_SBKD.shape[2]} of keys"
    numbers_BS = None if documents is None else documents.numbers_BS(q_SBND.shape[1])
    return apply(_BlockAttention, q_SBND, k_SBKD, v_SBKD, numbers_BS, scores)


class _BlockAttention(torch.autograd.Function):
    """Saves its inputs, its output and of each query and head the logarithm of the sum of exponentials."""

    @staticmethod
    def forward(
        ctx: Any, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, numbers_BS: Tensor | None, scores: Scores
    ) -> Tensor:
        out_SBND = torch.empty(q_SBND.shape, dtype=q_SBND.dtype, device=q_SBND.device)
        log_sums = []
        for rows in _blocks(q_SBND):
            raw = _raw_scores(q_SBND, k_SBKD, rows)
            held = _held_scores(raw, numbers_BS, scores, rows)
            log_sum = held.logsumexp(-1, keepdim=True)
            weights = held.sub_(log_sum).exp_()
            out = _product(weights.to(_narrow(v_SBKD)), _keys(v_SBKD, rows))
            out_SBND[rows.start : rows.stop] = _rows_first(out, q_SBND, len(rows))
            log_sums.append(log_sum)
        ctx.save_for_backward(q_SBND, k_SBKD, v_SBKD, out_SBND, numbers_BS, *log_sums)
        ctx.scores = scores
        return out_SBND

    @staticmethod
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_SBND, k_SBKD, v_SBKD, out_SBND, numbers_BS, *log_sums = ctx.saved_tensors
        scores, wide = ctx.scores, compute_dtype(q_SBND.dtype)
        grad_q = torch.empty(q_SBND.shape, dtype=q_SBND.dtype, device=q_SBND.device)
        grad_k, grad_v = (
            torch.zeros(x.shape[1], x.shape[2], x.shape[0], x.shape[3], dtype=wide, device=x.device)
            for x in (k_SBKD, v_SBKD)
        )
        for rows, log_sum in zip(_blocks(q_SBND), log_sums, strict=True):
            raw = _raw_scores(q_SBND, k_SBKD, rows)
            weights = _held_scores(raw, numbers_BS, scores, rows).sub_(log_sum).exp_()
            grad_out, out = (_grouped(x, k_SBKD, rows) for x in (grad_SBND, out_SBND))
            group = _product(weights.to(_narrow(v_SBKD)).mT, grad_out)
            grad_v[:, :, : rows.stop] += group.view(*grad_v.shape[:2], *group.shape[1:])
            mean = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
            grad_raw = _product(grad_out, _keys(v_SBKD, rows).mT).sub_(mean).mul_(weights)
            if scores.clamp is not None:
                grad_raw.mul_(raw.abs() <= scores.clamp)
            grad_raw = grad_raw.mul_(q_SBND.shape[-1] ** -0.5).to(_narrow(q_SBND))
            grad_q[rows.start : rows.stop] = _rows_first(_product(grad_raw, _keys(k_SBKD, rows)), q_SBND, len(rows))
            group = _product(grad_raw.mT, _grouped(q_SBND, k_SBKD, rows))
            grad_k[:, :, : rows.stop] += group.view(*grad_k.shape[:2], *group.shape[1:])
        grad_k_SBKD, grad_v_SBKD = (x.permute(2, 0, 1, 3).to(q_SBND.dtype) for x in (grad_k, grad_v))
        return grad_q, grad_k_SBKD, grad_v_SBKD, None, None


def _blocks(q_SBND: Tensor) -> list[range]:
    """The queries, block by block: as many as have ``MOST_SCORES`` scores."""
    seq_len, num_samples, num_heads, _ = q_SBND.shape
    step = max(1, min(seq_len, MOST_SCORES // (num_samples * num_heads * seq_len)))
    return [range(start, min(start + step, seq_len)) for start in range(0, seq_len, step)]


def _grouped(x_SBND: Tensor, k_SBKD: Tensor, rows: range) -> Tensor:
    """Queries ``rows`` by key head: (B * K, heads of the group * rows, D)."""
    num_samples, num_groups, size = *k_SBKD.shape[1:3], x_SBND.shape[3]
    block = x_SBND[rows.start : rows.stop].permute(1, 2, 0, 3)
    return block.reshape(num_samples * num_groups, -1, size)


def _rows_first(x: Tensor, like_SBND: Tensor, num_rows: int) -> Tensor:
    """``_grouped`` undone: (rows, B, N, D)."""
    _, num_samples, num_heads, size = like_SBND.shape
    return x.view(num_samples, num_heads, num_rows, size).permute(2, 0, 1, 3)


def _keys(k_SBKD: Tensor, rows: range) -> Tensor:
    """All keys that the queries ``rows`` may see: (B * K, T, D)."""
    return k_SBKD[: rows.stop].permute(1, 2, 0, 3).flatten(0, 1)


def _raw_scores(q_SBND: Tensor, k_SBKD: Tensor, rows: range) -> Tensor:
    """Scaled scores in ``compute_dtype``, (B * K, heads of the group * rows, T)."""
    product = _product(_grouped(q_SBND, k_SBKD, rows), _keys(k_SBKD, rows).mT)
    return product.mul_(q_SBND.shape[-1] ** -0.5)


def _held_scores(raw: Tensor, numbers_BS: Tensor | None, scores: Scores, rows: range) -> Tensor:
    """A new tensor of what the softmax takes: clamped, biased, and of later or foreign tokens minus infinity."""
    columns = range(rows.stop)
    held = raw.clone() if scores.clamp is None else raw.clamp(-scores.clamp, scores.clamp)
    bias = scores.bias(rows, columns, dtype=raw.dtype, device=raw.device)
    if bias is not None:
        held.view(-1, *bias.shape).add_(bias)
    by_row = held.view(held.shape[0], -1, len(rows), len(columns))
    query, key = (torch.arange(x.start, x.stop, device=raw.device) for x in (rows, columns))
    by_row.masked_fill_(key[None, :] > query[:, None], float("-inf"))
    if numbers_BS is not None:
        foreign = numbers_BS[:, rows.start : rows.stop, None] != numbers_BS[:, None, : rows.stop]
        held.view(numbers_BS.shape[0], -1, len(rows), len(columns)).masked_fill_(foreign[:, None], float("-inf"))
    return held


def _narrow(x: Tensor) -> torch.dtype:
    """What is multiplied with ``x``: on a GPU tensors of its own type, elsewhere of the wide one."""
    return x.dtype if x.device.type == "cuda" else compute_dtype(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The batch of products in ``compute_dtype``; only CUDA multiplies 16-bit tensors into a float32 result."""
    wide = compute_dtype(b.dtype)
    if a.dtype is b.dtype and a.dtype is not wide and a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))
