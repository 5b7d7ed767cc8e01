"""The functions of ``csrc/`` in numpy: their specification, and what runs where the extension is not built."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.documents import DocumentRules

BLOCK: Final = 1 << 20  # documents whose tokens are counted at once


class LegacyShuffle:
    """``numpy.random.RandomState(seed).shuffle``; one after the other they continue the same stream.

    Raises:
        ValueError: the seed is not in [0, 2**32).
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)

    def shuffle(self, values: NDArray[Any], report: Callable[[int], None]) -> None:
        """Shuffle int32, uint32 or int64 in place; ``report`` is told how many were moved since the last call."""
        self._random.shuffle(values)
        report(max(len(values) - 1, 0))


def fill_sample_index(
    lengths: NDArray[np.int32], documents: NDArray[np.int32], seq_len: int, start: tuple[int, int], out: NDArray[Any]
) -> None:
    """Where samples start when documents are laid end to end and cut every ``seq_len`` tokens.

    Sample i holds the ``seq_len + 1`` tokens from its row up to and including the token at the next row.

    Args:
        lengths: tokens of each sequence.
        documents: the sequences in the order they are read, an epoch after the other.
        seq_len: tokens from one sample to the next.
        start: a sample's position in ``documents``, and offset in that document.
        out: int32 or int64 ``[N, 2]``: the same of the N samples that follow that one.

    Raises:
        ValueError: a document does not exist, or the tokens run out.
    """
    position, token = start
    if seq_len < 1 or position < 0 or token < 0:
        raise ValueError("seq_len must be positive, the start not negative")
    target, written = token + seq_len, 0  # tokens from the document at ``position`` to the next row
    while written < len(out):
        block = documents[position : position + BLOCK]
        if len(block) == 0:
            raise ValueError("the documents hold fewer tokens than the samples need")
        if not 0 <= block.min() <= block.max() < len(lengths):
            raise ValueError(f"document {block.max()} does not exist: there are {len(lengths)}")
        ends = np.cumsum(lengths[block], dtype=np.int64)
        targets = np.arange(target, ends[-1], seq_len)[: len(out) - written]
        places = np.searchsorted(ends, targets, side="right")
        rows = out[written : written + len(targets)]
        rows[:, 0] = position + places
        rows[:, 1] = targets - (ends - lengths[block])[places]
        position, written = position + len(block), written + len(targets)
        target += len(targets) * seq_len - int(ends[-1])


def build_blending_indices(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which data set each sample of a blend comes from, and which of that set's samples it is.

    Sample i goes to the set that lags furthest behind ``weight * max(i, 1)``, the first of equals.

    Raises:
        ValueError: no data set, or more than 32,767, or a negative size.
    """
    return _blend(weights, np.full(len(weights), np.iinfo(np.int64).max), size)


def build_exhaustive_blending_indices(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The same in proportion to ``sizes``, until every set is used up.

    Raises:
        ValueError: no data set, or more than 32,767.
    """
    size = int(sizes.sum())
    return _blend(sizes / max(size, 1), sizes, size)


def _blend(
    weights: NDArray[np.float64], limit: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    if not 1 <= len(weights) <= np.iinfo(np.int16).max or size < 0:
        raise ValueError("a blend takes 1 to 32767 data sets and a size that is not negative")
    taken = np.zeros(len(weights), dtype=np.int64)
    dataset, sample = np.empty(size, dtype=np.int16), np.empty(size, dtype=np.int64)
    for i in range(size):
        lag = np.where(taken < limit, weights * max(i, 1) - taken, -np.inf)
        chosen = int(np.argmax(lag))
        dataset[i], sample[i] = chosen, taken[chosen]
        taken[chosen] += 1
    return dataset, sample


def insert_breaks(text: bytes, table: NDArray[np.uint8], mark: int) -> bytes:
    """``text`` with the byte ``mark`` between two Han characters whose pair is not in the table of ``han_breaks``."""
    out, before = [], 0
    for character in text.decode("utf-8"):
        code = ord(character)
        is_han = 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF
        if is_han and before:
            hashed = (before << 16 | code) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            places = [(hashed >> 51) * 512 + (hashed >> shift & 511) for shift in (40, 31)]
            if not all(table[place >> 3] >> (place & 7) & 1 for place in places):
                out.append(chr(mark))
        out.append(character)
        before = code if is_han else 0
    return "".join(out).encode("utf-8")


def split_documents(
    ids: NDArray[np.uint32], *, documents: int, border: int, mark: int, end: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The tokens of documents of which each is followed by ``border``, end to end, and how many are each one's.

    ``mark`` is no token; ``end`` is put behind every document that has any, where it is not negative.

    Raises:
        ValueError: not so many ``documents``, or tokens behind the last one.
    """
    ids = ids[ids != mark]
    borders = np.flatnonzero(ids == border)
    if len(borders) != documents or len(ids) != (borders[-1] + 1 if documents > 0 else 0):
        raise ValueError(f"{len(borders)} borders, but {documents} documents")
    lengths = np.diff(borders, prepend=-1) - 1
    if end < 0:
        return np.delete(ids, borders), lengths
    full = lengths > 0
    ids[borders[full]] = end
    return np.delete(ids, borders[~full]), lengths + full


def read_sample(
    tokens: NDArray[Any],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int32],
    order: NDArray[np.int32],
    range: tuple[int, int, int, int],
    out: NDArray[np.int64],
) -> None:
    """The tokens of a sample to ``out``: ``range`` is a row of the sample index and the next one.

    Args:
        tokens: of the whole data set.
        offsets: the byte at which each sequence begins.
        lengths: tokens of each sequence.
        order: the sequences as they are read.
        range: place in the order and token in that sequence, of the first and of the last token.
        out: as long as the sample.

    Raises:
        ValueError: the range leaves the order, a sequence or the tokens, or does not fill ``out``.
    """
    (first, begin, last, end), place = range, 0
    if first < 0 or last >= len(order):
        raise ValueError("a sample outside of the order")
    sequences = order[first : last + 1]
    if len(sequences) > 0 and not 0 <= sequences.min() <= sequences.max() < len(lengths):
        raise ValueError("a sequence that does not exist")
    stops = lengths[sequences].tolist()
    stops[-1:] = [end + 1]
    for sequence, start, stop in zip(sequences.tolist(), [begin] + [0] * (last - first), stops, strict=True):
        source = int(offsets[sequence]) // tokens.dtype.itemsize + start
        if start < 0 or stop < start or source + stop - start > len(tokens) or place + stop - start > len(out):
            raise ValueError("a sample outside of its tokens")
        out[place : place + stop - start] = tokens[source : source + stop - start]
        place += stop - start
    if place != len(out):
        raise ValueError("a sample of too few tokens")


def lay_out(
    samples: NDArray[np.int64], *, eod: int, reset_positions: bool, reset_attention: bool, mask_loss: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int32] | None]:
    """Tokens, labels, loss mask and positions, ``[B, S]``, and document bounds of samples ``[B, S + 1]``.

    The rules are those of ``DocumentRules``.
    """
    rules = DocumentRules(
        eod=eod, reset_positions=reset_positions, reset_attention=reset_attention, mask_loss=mask_loss
    )
    tokens, labels = samples[:, :-1].copy(), samples[:, 1:].copy()
    return tokens, labels, rules.loss_mask(tokens), rules.positions(tokens), rules.bounds(tokens)
