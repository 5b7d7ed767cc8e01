"""Rotary positions of two ranges (NLPE): near tokens count as they lie, far ones closer.

Two tokens of a document that lie ``d`` apart count as ``d`` apart below the threshold T, and from there on as
``T + (d - T) / f``: near distances stay exact, which interpolation of all positions does not leave them. A rotation
depends on distances only, so far pairs are scored with q and k that are turned once more, at place s by
``(1 - 1/f) (T - s)`` and ``-(1 - 1/f) s`` positions: ``d + (1 - 1/f) (T - d) = T + (d - T) / f``. Which place a
document begins at does not matter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aquila.kernels.parts import Grads, Meeting, MeetingKernel, Part, Places, empty_sum, merge_
from megatron_aquila.kernels.precision import compute_dtype
from megatron_aquila.kernels.rope import apply_rope, rope_tables

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """``threshold`` T and ``factor`` f, and how pairs turn: ``base`` and ``interleaved`` as of the near rotation."""

    threshold: int
    factor: float
    base: float
    interleaved: bool = False

    def far_q(self, q_SBND: Tensor, places: Places) -> Tensor:
        """Queries that are turned to their ``places``, turned further for far pairs."""
        return self._turned(q_SBND, self.threshold - places_of(places, q_SBND))

    def far_k(self, k_SBKD: Tensor, places: Places) -> Tensor:
        """Keys, likewise."""
        return self._turned(k_SBKD, -places_of(places, k_SBKD))

    def far_q_gradient(self, grad_SBND: Tensor, places: Places) -> Tensor:
        """The gradient of ``far_q``'s input: turned back."""
        return self._turned(grad_SBND, places_of(places, grad_SBND) - self.threshold)

    def far_k_gradient(self, grad_SBKD: Tensor, places: Places) -> Tensor:
        """The gradient of ``far_k``'s input."""
        return self._turned(grad_SBKD, places_of(places, grad_SBKD))

    def _turned(self, x_SBND: Tensor, turn_S: Tensor) -> Tensor:
        turn_1S = (1 - 1 / self.factor) * turn_S.unsqueeze(0)
        tables = rope_tables(turn_1S, head_dim=x_SBND.shape[-1], base=self.base, dtype=turn_S.dtype)
        return apply_rope(x_SBND, *tables, interleaved=self.interleaved)


def places_of(places: Places, like: Tensor) -> Tensor:
    """The places of tokens one after the other, in ``compute_dtype`` of ``like`` and where it is."""
    wide, device = compute_dtype(like.dtype), like.device
    return torch.cat([torch.arange(run.start, run.stop, dtype=wide, device=device) for run in places])


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that meet keys, all or causally, near or far. ``is_flipped``: the last of both come first."""

    queries: slice
    keys: slice
    is_causal: bool
    is_far: bool
    is_flipped: bool = False

    def ordered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a piece as the kernel takes them, and back."""
        return [x.flip(0) for x in tensors] if self.is_flipped else list(tensors)


def pieces(meeting: Meeting, threshold: int) -> Iterator[Piece]:
    """All pairs of a meeting, each once, as slices of its queries and keys; every run of queries with every earlier run
    of keys, and with itself.

    Of a run itself, queries go by blocks of T tokens: with its own block each is near, and all before is earlier.
    """
    for rows, queries in _runs(meeting.queries):
        for columns, keys in _runs(meeting.keys):
            if keys.stop <= queries.start:
                yield from _rectangle(rows, columns, queries.start - keys.start, threshold)
            elif keys == queries:
                for first in range(0, len(queries), threshold):
                    own = slice(first, min(first + threshold, len(queries)))
                    block, its_keys = rows[own], columns[own]
                    yield Piece(_slice(block), _slice(its_keys), is_causal=True, is_far=False)
                    yield from _rectangle(block, columns[:first], first, threshold)


def _runs(places: Places) -> Iterator[tuple[range, range]]:
    """Where each run lies among the tokens, and its places."""
    first = 0
    for run in places:
        yield range(first, first + len(run)), run
        first += len(run)


def _rectangle(rows: range, columns: range, apart: int, threshold: int) -> Iterator[Piece]:
    """All pairs of ``rows`` and ``columns``, the i-th and the j-th of which lie ``apart + i - j`` apart, all positive.

    Far are those with ``j <= i + shift``: from the row on that has one, ``some``, a causal square, what is left of it,
    and all of the rows below it, from ``full`` on. Near is what is right of the diagonal: all of the rows above
    ``some``; then, last row and column first, another causal square, one smaller where it ends with the columns, and
    what is right of it.
    """
    shift = apart - threshold
    some, full, last = (min(max(row, 0), len(rows)) for row in (-shift, len(columns) - shift, len(columns) - shift - 1))
    found = (
        (rows[:some], columns, False, False, False),
        (rows[some:full], columns[some + shift : full + shift], True, True, False),
        (rows[some:full], columns[: some + shift], False, True, False),
        (rows[full:], columns, False, True, False),
        (rows[some:last], columns[some + shift + 1 : last + shift + 1], True, False, True),
        (rows[some:last], columns[last + shift + 1 :], False, False, False),
    )
    for queries, keys, is_causal, is_far, is_flipped in found:
        if queries and keys:
            yield Piece(_slice(queries), _slice(keys), is_causal, is_far, is_flipped)


def _slice(held: range) -> slice:
    return slice(held.start, held.stop)


@dataclass(frozen=True, slots=True)
class TwoRangeBlocks:
    """A ``MeetingKernel`` that takes each pair by the distance it counts as, by one that need not know of distances.

    q and k are turned to their places. No more is kept for backward than by other attention: far q and k are made
    again.
    """

    kernel: MeetingKernel
    ranges: Ranges

    def attend(self, q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, meeting: Meeting) -> Part:
        """As of ``MeetingKernel``."""
        o, lse = empty_sum(q_SBND)
        parts = list(pieces(meeting, self.ranges.threshold))
        pairs = self._pairs(q_SBND, k_TBKD, meeting, parts)
        for piece in parts:
            rows, keys = piece.queries, piece.keys
            q_of, k_of = pairs[piece.is_far]
            q, k, v = piece.ordered((q_of[rows], k_of[keys], v_TBKD[keys]))
            part = self.kernel.attend(q, k, v, Meeting(is_causal=piece.is_causal))
            o_part, lse_part = piece.ordered(part)
            merge_((o[rows], lse[rows]), (o_part, lse_part))
        return o, lse

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
        grad_q, grad_k, grad_v = grads
        parts = list(pieces(meeting, self.ranges.threshold))
        pairs = self._pairs(q_SBND, k_TBKD, meeting, parts)
        far = [[torch.zeros_like(x, dtype=lse_SBN.dtype) for x in pair] for pair in pairs[1:]]
        of_pairs = [[grad_q, grad_k], *far]
        for piece in parts:
            rows, keys = piece.queries, piece.keys
            q_of, k_of = pairs[piece.is_far]
            of_q, of_k = of_pairs[piece.is_far]
            grad, q, k, v, out, lse = piece.ordered(
                (grad_o[rows], q_of[rows], k_of[keys], v_TBKD[keys], o[rows], lse_SBN[rows])
            )
            sums = found = of_q[rows], of_k[keys], grad_v[keys]
            if piece.is_flipped:
                found = torch.zeros_like(sums[0]), torch.zeros_like(sums[1]), torch.zeros_like(sums[2])
            self.kernel.add_gradients_(found, grad, q, k, v, out, lse, Meeting(is_causal=piece.is_causal))
            if piece.is_flipped:
                for total, share in zip(sums, found, strict=True):
                    total += share.flip(0)
        pairs.clear()
        for far_q, far_k in far:
            grad_q += self.ranges.far_q_gradient(far_q, meeting.queries)
            grad_k += self.ranges.far_k_gradient(far_k, meeting.keys)

    def _pairs(
        self, q_SBND: Tensor, k_TBKD: Tensor, meeting: Meeting, parts: Sequence[Piece]
    ) -> list[tuple[Tensor, Tensor]]:
        """q and k for near pairs and, if there are any, for far ones."""
        near = [(q_SBND, k_TBKD)]
        if not any(piece.is_far for piece in parts):
            return near
        ranges = self.ranges
        return [*near, (ranges.far_q(q_SBND, meeting.queries), ranges.far_k(k_TBKD, meeting.keys))]
