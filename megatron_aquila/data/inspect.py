"""What is in a data set, or in the sets of a blend: counts, lengths, texts, scripts, and how often it will be read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.blend import parse_blend
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.tokenizer import Tokenizer

WIDTH: Final = 40  # characters of the longest bar
SHOWN_TOKENS: Final = 200
SCRIPTS: Final = {  # what a character is, the first that fits
    "Han": re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]"),
    "Latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
    "other letters": re.compile(r"[^\W\d_]"),
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
    """The text of a document's first tokens; ``num_tokens`` is how many the document has."""

    document: int
    num_tokens: int
    shown_tokens: int
    text: str


def excerpt(dataset: IndexedDataset, document: int, tokenizer: Tokenizer, *, tokens: int = SHOWN_TOKENS) -> Excerpt:
    """Decode the beginning of a document.

    Raises:
        IndexError: no such document.
    """
    bounds = dataset.document_indices
    if not 0 <= document < len(bounds) - 1:
        raise IndexError(f"{dataset.prefix}: document {document}: it has {len(bounds) - 1}")
    ids: list[int] = []
    sequences = range(int(bounds[document]), int(bounds[document + 1]))
    for sequence in sequences:
        if len(ids) < tokens:
            ids += dataset[sequence][: tokens - len(ids)].tolist()
    total = int(dataset.sequence_lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
    return Excerpt(document, total, len(ids), tokenizer.decode(ids))


def pick_documents(dataset: IndexedDataset, count: int, *, seed: int = 0) -> list[int]:
    """``count`` documents by chance, each at most once, in their order; all of them where there are fewer."""
    documents = len(dataset.document_indices) - 1
    chosen = np.random.default_rng(seed).choice(documents, size=min(count, documents), replace=False)
    return sorted(map(int, chosen))


def script_shares(texts: Sequence[str]) -> dict[str, float]:
    """Which share of the characters that are no blanks belongs to which script; what is left is ``signs``."""
    counts = dict.fromkeys([*SCRIPTS, "signs"], 0)
    for text in texts:
        rest = "".join(text.split())
        for name, pattern in SCRIPTS.items():
            rest, found = pattern.subn("", rest)
            counts[name] += found
        counts["signs"] += len(rest)
    total = max(sum(counts.values()), 1)
    return {name: count / total for name, count in counts.items()}


@dataclass(frozen=True, slots=True)
class SourceStats:
    """A set of a blend: what it holds, the share of the tokens that are read that come from it, its expected epochs.

    ``epochs`` is how often each of its documents is read on average; ``scripts`` is None where no tokenizer is given.
    """

    prefix: str
    documents: int
    tokens: int
    share: float
    epochs: float
    scripts: dict[str, float] | None


def source_stats(
    paths: Sequence[str], budget_tokens: int, tokenizer: Tokenizer | None = None, *, sampled: int = 200
) -> list[SourceStats]:
    """Each set of ``--data-path`` under a budget of tokens to read; scripts are estimated from ``sampled`` documents.

    Without weights a set has the share of its size.

    Raises:
        DataError: a path or a weight makes no sense, or a file is missing or damaged.
    """
    prefixes, weights = parse_blend(paths)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    parts = [float(len(dataset.tokens)) for dataset in datasets] if weights is None else weights
    stats = []
    for dataset, part in zip(datasets, parts, strict=True):
        tokens, share = len(dataset.tokens), part / max(sum(parts), 1e-300)
        scripts = None
        if tokenizer is not None:
            chosen = pick_documents(dataset, sampled)
            scripts = script_shares([excerpt(dataset, number, tokenizer).text for number in chosen])
        epochs = share * budget_tokens / tokens if tokens > 0 else 0.0
        stats.append(SourceStats(dataset.prefix, len(dataset.document_indices) - 1, tokens, share, epochs, scripts))
    return stats
