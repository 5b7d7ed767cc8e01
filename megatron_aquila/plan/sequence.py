"""How the tokens of a sample are dealt to the context-parallel ranks, and which of them meet in a step of the ring."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

ContextMethod = Literal["ring", "ulysses"]


def shard_pieces(seq_len: int, *, cp: int, rank: int, method: ContextMethod = "ring") -> tuple[range, ...]:
    """The places of a sample whose tokens the context rank ``rank`` of ``cp`` holds, ascending.

    For a ring two pieces of the same length, the rank's own from the head and from the tail: causal attention of an
    early piece is cheap and of its late twin dear, so that all ranks have the same work. For Ulysses, where every rank
    attends over the whole sample, one piece.
    """
    pieces = num_pieces(cp, method)
    size, rest = divmod(seq_len, pieces)
    assert rest == 0, f"{seq_len} tokens do not divide into {pieces} pieces"
    own = (rank,) if pieces == cp else (rank, pieces - 1 - rank)
    return tuple(range(piece * size, (piece + 1) * size) for piece in own)


def num_pieces(cp: int, method: ContextMethod) -> int:
    """Of how many equal pieces a sample is, whose tokens ``cp`` ranks share."""
    return cp if method == "ulysses" or cp == 1 else 2 * cp


def num_shared_heads(num_kv_heads: int, cp: int) -> int:
    """Key/value heads, copies included, of which each of ``cp`` ranks of Ulysses gets as many."""
    return math.lcm(num_kv_heads, cp)


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that meet keys, as slices of what a rank holds: all pairs, or causally where both are the same tokens.

    With the places of both in their sample, run by run.
    """

    samples: slice
    queries: slice
    keys: slice
    is_causal: bool
    query_places: tuple[range, ...]
    key_places: tuple[range, ...]


def ring_blocks(
    bounds: Sequence[int] | None, *, num_samples: int, seq_len: int, cp: int, rank: int, owner: int
) -> list[Block]:
    """What the queries of ``rank`` have to do with the keys of ``owner``, both shards of a ring.

    ``bounds`` are those of ``kernels.documents.Documents``; None: a sample is one document. What a rank holds of a
    document lies together, so its own tokens meet in one causal square a document. Of another rank's keys there is at
    most one document a sample whose later tokens are here, and all of them are earlier: one rectangle, no mask.
    """
    queries, keys = (shard_pieces(seq_len, cp=cp, rank=one) for one in (rank, owner))
    if bounds is None:
        return _sample_blocks((0, seq_len), slice(None), queries, keys, rank, owner)
    return [
        block
        for sample in range(num_samples)
        for block in _sample_blocks(
            _documents(bounds, sample * seq_len, seq_len), slice(sample, sample + 1), queries, keys, rank, owner
        )
    ]


def _documents(bounds: Sequence[int], first: int, seq_len: int) -> list[int]:
    """The bounds of one sample's documents, counted from its first token."""
    begin, end = bisect_right(bounds, first) - 1, bisect_right(bounds, first + seq_len - 1) + 1
    return [bound - first for bound in bounds[begin:end]]


def _sample_blocks(
    bounds: Sequence[int],
    samples: slice,
    queries: tuple[range, ...],
    keys: tuple[range, ...],
    rank: int,
    owner: int,
) -> list[Block]:
    if rank == owner:
        squares = [_held(queries, start, stop) for start, stop in pairwise(bounds)]
        return [
            Block(samples, square, square, True, places := _places(queries, square), places)
            for square in squares
            if square.start < square.stop
        ]
    # An earlier rank's head is before all that is here, its tail after it; of a later rank all is before the tail here.
    half = len(queries[0])
    meeting = keys[0][-1] if owner < rank else queries[1][0]
    document = bisect_right(bounds, meeting) - 1
    start, stop = bounds[document], bounds[document + 1]
    here, there = _held(queries, start, stop), _held(keys, start, stop)
    if owner < rank:
        there = slice(there.start, min(there.stop, half))
    else:
        here = slice(max(here.start, half), here.stop)
    if here.start == here.stop or there.start >= there.stop:
        return []
    return [Block(samples, here, there, False, _places(queries, here), _places(keys, there))]


def _held(pieces: tuple[range, ...], start: int, stop: int) -> slice:
    """Where in a shard the tokens ``start : stop`` of the sample lie that it holds."""
    return slice(*(sum(min(max(place - piece.start, 0), len(piece)) for piece in pieces) for place in (start, stop)))


def _places(pieces: tuple[range, ...], held: slice) -> tuple[range, ...]:
    """The places of the tokens ``held`` of a shard."""
    firsts = itertools.accumulate((len(piece) for piece in pieces), initial=0)
    runs = (
        piece[max(held.start - first, 0) : max(held.stop - first, 0)]
        for first, piece in zip(firsts, pieces, strict=False)
    )
    return tuple(run for run in runs if run)
