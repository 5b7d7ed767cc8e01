"""Rotary positions of two ranges (NLPE): near tokens count as they lie, far ones closer.

Two tokens of a document that lie ``d`` apart count as ``d`` apart below the threshold T, and from there on as
``T + (d - T) / f``: near distances stay exact, which interpolation of all positions does not leave them. A rotation
depends on distances only, so far pairs are scored with q and k that are turned once more, at place s by
``(1 - 1/f) (T - s)`` and ``-(1 - 1/f) s`` positions: ``d + (1 - 1/f) (T - d) = T + (d - T) / f``. Which place a
document begins at does not matter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.blocks import BlockAttention, Part, empty_sum, merge_
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import apply, compute_dtype
from megatron_aquila.kernels.rope import apply_rope, rope_tables

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """``threshold`` T and ``factor`` f, and how pairs turn: ``base`` and ``interleaved`` as of the near rotation."""

    threshold: int
    factor: float
    base: float
    interleaved: bool = False

    def tables(self, like_SBND: Tensor) -> tuple[Tables, Tables]:
        """Cosines and sines by which q, and by which k, turned to their places, are turned for far pairs."""
        wide, device = compute_dtype(like_SBND.dtype), like_SBND.device
        place_1S = torch.arange(like_SBND.shape[0], dtype=wide, device=device).unsqueeze(0)
        share = 1 - 1 / self.factor
        of_q, of_k = (
            rope_tables(share * turn, head_dim=like_SBND.shape[-1], base=self.base, dtype=wide)
            for turn in (self.threshold - place_1S, -place_1S)
        )
        return of_q, of_k

    def far(self, x_SBND: Tensor, tables: Tables) -> Tensor:
        """``x`` turned further."""
        return apply_rope(x_SBND, *tables, interleaved=self.interleaved)

    def far_gradient(self, grad_SBND: Tensor, tables: Tables) -> Tensor:
        """The gradient of ``far``'s input: turned back."""
        cos, sin = tables
        return apply_rope(grad_SBND, cos, -sin, interleaved=self.interleaved)


def two_range_reference(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None, *, ranges: Ranges
) -> Tensor:
    """``causal_attention_reference`` with far pairs scored by what ``Ranges.far`` gives. Holds all S x S scores."""
    wide, group = compute_dtype(q_SBND.dtype), q_SBND.shape[2] // k_SBKD.shape[2]
    q, k, v = (x.to(wide) for x in (q_SBND, k_SBKD, v_SBKD))
    of_q, of_k = ranges.tables(q)
    k, k_far, v = (x.repeat_interleave(group, dim=2) for x in (k, ranges.far(k, of_k), v))
    near, far = (torch.einsum("sbnd,tbnd->bnst", *pair) for pair in ((q, k), (ranges.far(q, of_q), k_far)))
    place = torch.arange(q.shape[0], device=q.device)
    apart = place[:, None] - place
    scores = torch.where(apart < ranges.threshold, near, far) * q.shape[-1] ** -0.5
    hidden = apart < 0
    if documents is not None:
        number_BS = documents.numbers_BS(q.shape[1])
        hidden = hidden | (number_BS[:, None, :, None] != number_BS[:, None, None, :])
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q_SBND.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoRangeAttention:
    """``two_range_reference`` as a ``CausalAttention``, by a kernel of blocks; q and k are turned to their places.

    No more is kept for backward than by other attention: far q and k are made again.
    """

    kernel: BlockAttention
    ranges: Ranges

    def __call__(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
        """q_SBND, k_SBKD, v_SBKD -> o_SBND."""
        return apply(_TwoRange, q_SBND, k_SBKD, v_SBKD, self, documents)


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that meet keys, all or causally, near or far. ``is_flipped``: the last of both come first."""

    queries: slice
    keys: slice
    is_causal: bool
    is_far: bool
    is_flipped: bool = False


def pieces(start: int, stop: int, threshold: int) -> Iterator[Piece]:
    """All pairs of the document ``start : stop``, each once.

    Queries go by blocks of T tokens. With its own block each is near. In the block before, T + r - c apart for row r
    and column c: far on and below the diagonal, a causal square; near above it, which from the last row and column on
    is a causal square one smaller; where the last block is short, a rectangle of near keys remains. All before is far.
    """
    for first in range(start, stop, threshold):
        last = min(first + threshold, stop)
        size, before, queries = last - first, first - threshold, slice(first, last)
        yield Piece(queries, queries, is_causal=True, is_far=False)
        if before < start:
            continue
        yield Piece(queries, slice(before, before + size), is_causal=True, is_far=True)
        if size > 1:
            upper = slice(before + 1, before + size)
            yield Piece(slice(first, last - 1), upper, is_causal=True, is_far=False, is_flipped=True)
        if size < threshold:
            yield Piece(queries, slice(before + size, first), is_causal=False, is_far=False)
        if before > start:
            yield Piece(queries, slice(start, before), is_causal=False, is_far=True)


def _all_pieces(
    length: int, num_samples: int, documents: Documents | None, threshold: int
) -> Iterator[tuple[slice, Piece]]:
    """With the samples that each piece is of."""
    if documents is None:
        yield from ((slice(0, num_samples), piece) for piece in pieces(0, length, threshold))
        return
    for start, stop in pairwise(documents.bounds):
        sample = start // length
        for piece in pieces(start - sample * length, stop - sample * length, threshold):
            yield slice(sample, sample + 1), piece


class _TwoRange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: TwoRangeAttention, documents: Documents | None
    ) -> Tensor:
        ranges = attention.ranges
        ctx.attention, ctx.documents = attention, documents
        of_q, of_k = ranges.tables(q)
        pairs = ((q, k), (ranges.far(q, of_q), ranges.far(k, of_k)))
        o, lse = empty_sum(q)
        for samples, piece in _all_pieces(q.shape[0], q.shape[1], documents, ranges.threshold):
            rows, keys = (piece.queries, samples), (piece.keys, samples)
            q_of, k_of = pairs[piece.is_far]
            inputs = _ordered(piece, (q_of[rows], k_of[keys], v[keys]))
            part: Part = attention.kernel.forward(*inputs, piece.is_causal)
            o_part, lse_part = _ordered(piece, part)
            merge_((o[rows], lse[rows]), (o_part, lse_part))
        ctx.save_for_backward(q, k, v, out := o.to(q.dtype), lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        attention: TwoRangeAttention = ctx.attention
        ranges = attention.ranges
        q, k, v, o, lse = ctx.saved_tensors
        of_q, of_k = ranges.tables(q)
        pairs = ((q, k), (ranges.far(q, of_q), ranges.far(k, of_k)))
        grads = [tuple(torch.zeros_like(x, dtype=lse.dtype) for x in (q, k)) for _ in pairs]
        grad_v = torch.zeros_like(v, dtype=lse.dtype)
        for samples, piece in _all_pieces(q.shape[0], q.shape[1], ctx.documents, ranges.threshold):
            rows, keys = (piece.queries, samples), (piece.keys, samples)
            q_of, k_of = pairs[piece.is_far]
            inputs = _ordered(piece, (grad_o[rows], q_of[rows], k_of[keys], v[keys], o[rows], lse[rows]))
            found = _ordered(piece, attention.kernel.backward(*inputs, piece.is_causal))
            sums = (*grads[piece.is_far], grad_v)
            for total, place, part in zip(sums, (rows, keys, keys), found, strict=True):
                total[place] += part
        (grad_q, grad_k), (far_q, far_k) = grads
        grad_q += ranges.far_gradient(far_q, of_q)
        grad_k += ranges.far_gradient(far_k, of_k)
        return *(grad.to(q.dtype) for grad in (grad_q, grad_k, grad_v)), None, None


def _ordered(piece: Piece, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a piece as the kernel takes them, and back."""
    return [x.flip(0) for x in tensors] if piece.is_flipped else list(tensors)
