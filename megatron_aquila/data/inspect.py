"""What is in a data set, or in the sets of a blend: counts, lengths, texts, scripts, and how often it will be read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.blend import Library
from megatron_aquila.data.course import Reading
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import DataError

WIDTH: Final = 40  # characters of the longest bar
SHOWN_TOKENS: Final = 200
WINDOWS, WINDOW = 256, 1024  # drawn of a set, and tokens of each, to tell its scripts
SCRIPTS: Final = {  # what a character is
    "Han": re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]"),
    "Latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
    "other letters": re.compile(
        r"[^\W\d_A-Za-z\u00c0-\u024f\u1e00-\u1eff\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
    ),
    "digits": re.compile(r"\d"),
}


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Documents of ``low`` to ``high`` tokens, both included, and the tokens they have together."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a data set; lengths are tokens a document, ``longest`` is (document, tokens) from the longest down.

    ``percentiles``: the length that 1, 10, 50, 90 and 99 % of the documents do not exceed; all 0 without documents.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    percentiles: tuple[tuple[int, int], ...]
    bins: tuple[LengthBin, ...]
    longest: tuple[tuple[int, int], ...]

    def lines(self) -> list[str]:
        """For people: counts, a picture of the lengths, the longest documents."""
        mean = self.tokens / self.documents if self.documents > 0 else 0.0
        told = ", ".join(f"{share} % up to {length:,}" for share, length in self.percentiles)
        most = max((found.documents for found in self.bins), default=1)
        return [
            f"{self.prefix}: {self.documents:,} documents, {self.sequences:,} sequences, {self.tokens:,} tokens "
            f"({self.dtype})",
            f"tokens a document: mean {mean:,.1f}; {told}",
            *(_bar(found, most, self.tokens) for found in self.bins),
            "longest: " + ", ".join(f"document {number:,} with {length:,}" for number, length in self.longest),
        ]


def _bar(found: LengthBin, most: int, tokens: int) -> str:
    span = f"{found.low:,}" if found.low == found.high else f"{found.low:,} to {found.high:,}"
    bar = "█" * round(WIDTH * found.documents / most)
    return f"{span:>24} {bar:<{WIDTH}} {found.documents:>14,} documents {found.tokens / max(tokens, 1):>7.1%} of tokens"


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Tokens of each document, all its sequences together."""
    ends = np.zeros(len(dataset) + 1, dtype=np.int64)
    np.cumsum(dataset.sequence_lengths, out=ends[1:])
    return np.diff(ends[dataset.document_indices])


def summarize(dataset: IndexedDataset, *, longest: int = 5) -> Summary:
    """Counts and lengths; reads the index only."""
    lengths = document_lengths(dataset)
    shares = (1, 10, 50, 90, 99)
    cuts = np.percentile(lengths, shares, method="inverted_cdf").tolist() if len(lengths) > 0 else [0] * len(shares)
    count = min(longest, len(lengths))
    first = np.argpartition(-lengths, count - 1)[:count] if count > 0 else np.arange(0)
    first = first[np.lexsort((first, -lengths[first]))]
    return Summary(
        prefix=dataset.prefix,
        dtype=dataset.dtype.name,
        documents=len(lengths),
        sequences=len(dataset),
        tokens=int(lengths.sum()),
        percentiles=tuple(zip(shares, map(int, cuts), strict=True)),
        bins=_bins(lengths),
        longest=tuple((int(number), int(lengths[number])) for number in first),
    )


def _bins(lengths: NDArray[np.int64]) -> tuple[LengthBin, ...]:
    """0, 1, 2 to 3, 4 to 7, ... from the first that has a document to the last."""
    if len(lengths) == 0:
        return ()
    places = np.frexp(lengths.astype(np.float64))[1]
    documents = np.bincount(places)
    tokens = np.zeros(len(documents), dtype=np.int64)
    np.add.at(tokens, places, lengths)
    return tuple(
        LengthBin(2**place // 2, max(2**place - 1, 0), int(documents[place]), int(tokens[place]))
        for place in range(int(places.min()), len(documents))
    )


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The text of a document's first tokens, or their ids; ``num_tokens`` is how many the document has."""

    document: int
    num_tokens: int
    shown_tokens: int
    text: str


def excerpt(
    dataset: IndexedDataset, document: int, tokenizer: Tokenizer | None, *, tokens: int | None = SHOWN_TOKENS
) -> Excerpt:
    """Decode the first ``tokens`` of a document, or all of it; without a tokenizer its text is its ids.

    Raises:
        DataError: no such document.
    """
    bounds = dataset.document_indices
    if not 0 <= document < len(bounds) - 1:
        raise DataError(f"{dataset.prefix}: document {document}: it has {len(bounds) - 1}, from 0 on")
    ids: list[int] = []
    sequences = range(int(bounds[document]), int(bounds[document + 1]))
    total = int(dataset.sequence_lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
    wanted = total if tokens is None else tokens
    for sequence in sequences:
        if len(ids) < wanted:
            ids += dataset[sequence][: wanted - len(ids)].tolist()
    text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    return Excerpt(document, total, len(ids), text)


def pick_documents(dataset: IndexedDataset, count: int, *, seed: int = 0) -> list[int]:
    """``count`` documents by chance, each at most once, in their order; all of them where there are fewer."""
    documents = len(dataset.document_indices) - 1
    chosen = np.random.default_rng(seed).choice(documents, size=min(count, documents), replace=False)
    return sorted(map(int, chosen))


def script_of(text: str) -> str:
    """The script that most of the characters of a token belong to, or what it is instead."""
    if "\ufffd" in text:
        return "parts of characters"
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    most = max(counts.values())
    return next(name for name, count in counts.items() if count == most) if most > 0 else "signs and blanks"


def script_shares(dataset: IndexedDataset, tokenizer: Tokenizer, *, seed: int = 0) -> dict[str, float]:
    """Which share of a set's tokens belongs to which script, from ``WINDOWS`` windows of its tokens drawn by chance.

    Of a small set every token counts. Special tokens, as those that end documents, are ``special``.
    """
    tokens = dataset.tokens
    if len(tokens) > WINDOWS * WINDOW:
        starts = np.random.default_rng(seed).integers(0, len(tokens) - WINDOW, size=WINDOWS)
        tokens = np.concatenate([tokens[start : start + WINDOW] for start in np.sort(starts)])
    ids, counts = np.unique(tokens, return_counts=True)
    special = tokenizer.special_ids
    shares: dict[str, float] = {}
    for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
        name = "special" if token in special else script_of(tokenizer.decode([token]))
        shares[name] = shares.get(name, 0.0) + count / len(tokens)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class SourceStats:
    """A set of a blend: what it holds, how many tokens of it are read, and how often each of its tokens on average.

    ``scripts`` are shares of its tokens, ``None`` where no tokenizer is given.
    """

    prefix: str
    documents: int
    tokens: int
    read_tokens: float
    epochs: float
    scripts: dict[str, float] | None


def source_stats(
    readings: Mapping[str, Reading], library: Library, tokenizer: Tokenizer | None = None
) -> list[SourceStats]:
    """What each set of ``expected_readings`` holds.

    Raises:
        DataError: a file is missing or damaged.
    """
    return [
        SourceStats(
            prefix=prefix,
            documents=len(library.dataset(prefix).document_indices) - 1,
            tokens=len(library.dataset(prefix).tokens),
            read_tokens=reading.samples * library.seq_len,
            epochs=reading.epochs,
            scripts=None if tokenizer is None else script_shares(library.dataset(prefix), tokenizer),
        )
        for prefix, reading in readings.items()
    ]


def read_scripts(stats: Sequence[SourceStats]) -> dict[str, float]:
    """Which share of what is read belongs to which script; empty without a tokenizer."""
    total = sum(each.read_tokens for each in stats)
    shares: dict[str, float] = {}
    for each in stats:
        for name, share in (each.scripts or {}).items():
            shares[name] = shares.get(name, 0.0) + share * each.read_tokens / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
