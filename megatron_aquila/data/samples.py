"""Fixed-length samples cut from documents in a shuffled order: Megatron-LM's GPT packing, value for value."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.cache import Blocks, IndexCache
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.native import LegacyShuffle, fill_sample_index, read_sample
from megatron_aquila.data.progress import Report, counting, ignore
from megatron_aquila.errors import DataError

# The last epoch is shuffled on its own when less than this share of it is needed (Megatron-LM's constant).
SEPARATE_BELOW: Final = 0.80
BLOCK: Final = 1 << 18  # samples whose places are worked out before they are written away


@dataclass(frozen=True, slots=True)
class Sample:
    """``tokens``: int64 ``[seq_len + 1]``; the labels are the tokens moved by one. ``source``: index into ``names``.

    ``padding``: how many of the last tokens, zeros, only fill the sample up; as labels they do not count.
    """

    tokens: NDArray[np.int64]
    source: int
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``stop`` of a sequence of the data set ``source``, an index into ``datasets``."""

    source: int
    sequence: int
    start: int
    stop: int


class SampleSource(Protocol):
    """Numbered samples of equal length; sample i never changes."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a sample's ``source`` counts: the data sets' prefixes."""

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        """The data sets of ``names``."""

    def spans(self, index: int) -> list[Span]:
        """Where the tokens of a sample come from, in order; as fast as reading it."""

    def samples_with(self, source: int, sequence: int) -> NDArray[np.int64]:
        """The samples, ascending, that hold a token of a sequence. Searches the whole index."""

    def taken(self, stop: int) -> NDArray[np.int64]:
        """How many of the first ``stop`` samples come from each of ``names``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self) -> str:
        """A line a data set, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How samples are cut from a range of sequences; the indices are a function of this and the sequences' lengths.

    ``num_samples``: at least this many, over as many epochs as that takes; ``None``: one epoch. ``keep_partial``: what
    is left after the last whole sample is one more, which is filled up.
    """

    first: int
    end: int
    num_samples: int | None
    seq_len: int
    seed: int
    keep_partial: bool = False

    def num_epochs(self, epoch_tokens: int) -> int:
        """Epochs until the samples wanted, and the label of the last token, are there."""
        wanted = 0 if self.num_samples is None else self.num_samples * self.seq_len + 1
        return max(1, -(-wanted // epoch_tokens))

    def samples_in(self, tokens: int) -> int:
        """Whole samples in that many tokens."""
        return (tokens - 1) // self.seq_len

    def total(self, epoch_tokens: int) -> int:
        """All samples, the last partial one among them where that is kept."""
        tokens = self.num_epochs(epoch_tokens) * epoch_tokens
        return -(-(tokens - 1) // self.seq_len) if self.keep_partial else self.samples_in(tokens)

    def padding(self, epoch_tokens: int) -> int:
        """Tokens that the last sample has too few."""
        tokens = self.num_epochs(epoch_tokens) * epoch_tokens
        return max(0, self.total(epoch_tokens) * self.seq_len + 1 - tokens)

    def build(self, lengths: NDArray[np.int32], report: Report = ignore) -> Iterator[tuple[str, NDArray[Any] | Blocks]]:
        """``document_index``, ``sample_index`` and ``shuffle_index``, equal to Megatron-LM's for the same settings.

        They come one by one, and that of samples in blocks, so that who writes them away needs no memory for all;
        ``lengths`` are of all sequences of the data set, of which at least one in the range has a token.
        """
        epoch_tokens = int(lengths[self.first : self.end].sum(dtype=np.int64))
        epochs = self.num_epochs(epoch_tokens)
        total = self.total(epoch_tokens)
        before_last = self.samples_in((epochs - 1) * epoch_tokens)
        separate = epochs > 1 and (self.num_samples or 0) - before_last < int(
            SEPARATE_BELOW * self.samples_in(epoch_tokens)
        )
        random = LegacyShuffle(self.seed)
        documents = self._shuffled_documents([epochs - 1, 1] if separate else [epochs], random, report)
        yield "document_index", documents
        yield "sample_index", self._sample_index(lengths, documents, epoch_tokens, report)
        del documents
        yield "shuffle_index", _shuffled_ranges([0, before_last, total] if separate else [0, total], random, report)

    def _sample_index(
        self, lengths: NDArray[np.int32], documents: NDArray[np.int32], epoch_tokens: int, report: Report
    ) -> Blocks:
        """A row a sample, and where the last one ends: if it is not whole, with the last document.

        The first row is (0, 0) even where that document is empty.
        """
        total = self.total(epoch_tokens)
        whole = total - (self.padding(epoch_tokens) > 0)
        dtype = np.dtype(np.int64 if len(documents) > np.iinfo(np.int32).max else np.int32)

        def blocks() -> Iterator[NDArray[Any]]:
            last = np.zeros((1, 2), dtype=dtype)
            yield last
            for done in range(0, whole, BLOCK):
                report("samples", done, total)
                rows = np.empty((min(BLOCK, whole - done), 2), dtype=dtype)
                document, token = last[-1].tolist()
                fill_sample_index(lengths, documents, self.seq_len, (document, token), rows)
                yield rows
                last = rows[-1:]
            if whole < total:
                yield np.array([[len(documents) - 1, lengths[documents[-1]] - 1]], dtype=dtype)

        return Blocks((total + 1, 2), dtype, blocks())

    def _shuffled_documents(self, epochs: list[int], random: LegacyShuffle, report: Report) -> NDArray[np.int32]:
        """Groups of epochs, each group shuffled as a whole."""
        size = self.end - self.first
        documents = np.empty(sum(epochs) * size, dtype=np.int32)
        documents.reshape(-1, size)[:] = np.arange(self.first, self.end, dtype=np.int32)
        counted = counting(report, "documents", len(documents))
        for group in np.split(documents, [epochs[0] * size]):
            random.shuffle(group, counted)
        return documents


def _shuffled_ranges(bounds: list[int], random: LegacyShuffle, report: Report = ignore) -> NDArray[Any]:
    """The numbers from one bound to the next, shuffled within; uint32 where they fit, as in Megatron-LM."""
    dtype = np.int64 if bounds[-1] >= np.iinfo(np.uint32).max - 1 else np.uint32
    numbers = np.arange(bounds[0], bounds[-1], dtype=dtype)
    counted = counting(report, "order of samples", len(numbers))
    for start, stop in pairwise(bounds):
        random.shuffle(numbers[start - bounds[0] : stop - bounds[0]], counted)
    return numbers


def tokens_between(dataset: IndexedDataset, first: int, end: int, *, split: str) -> int:
    """Tokens of the sequences from ``first`` to ``end``, which are the ``split`` of a data set.

    Raises:
        DataError: there are none, or more sequences than an int32 counts.
    """
    if end > np.iinfo(np.int32).max:
        raise DataError(
            f"{_where(dataset, first, end, split)} cannot be counted in Megatron-LM's int32; split the data set into "
            "several"
        )
    tokens = int(dataset.sequence_lengths[first:end].sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(f"{_where(dataset, first, end, split)} holds no tokens; {_more(dataset, first, end)}")
    return tokens


def _where(dataset: IndexedDataset, first: int, end: int, split: str) -> str:
    return f"{dataset.prefix}: the {split} split, sequences {first} to {end} of {len(dataset)},"


def _more(dataset: IndexedDataset, first: int, end: int) -> str:
    """The way out where a part of a data set is too small."""
    if (first, end) == (0, len(dataset)):
        return "leave the data set out"
    return "give it a larger share with --split, or 0 to leave it out"


class PackedSamples:
    """Samples of one data set: a ``SampleSource`` with one name.

    Attributes: ``document_index`` (int32), ``sample_index`` (rows of position in it and offset), ``shuffle_index``,
    ``epoch_tokens``, ``num_epochs``.

    Raises:
        DataError: the range holds no token, or, with ``num_samples`` ``None``, not one whole sample; or the data set
            has more sequences than an int32 counts.
    """

    def __init__(self, dataset: IndexedDataset, packing: Packing, cache: IndexCache, *, split: str) -> None:
        self.dataset, self.packing, self.split = dataset, packing, split
        lengths = dataset.sequence_lengths
        self.epoch_tokens = tokens_between(dataset, packing.first, packing.end, split=split)
        if packing.num_samples is None and packing.total(self.epoch_tokens) == 0:
            raise DataError(
                f"{_where(dataset, packing.first, packing.end, split)} holds {self.epoch_tokens} tokens, fewer than "
                f"the {packing.seq_len + 1} of one sample; {_more(dataset, packing.first, packing.end)}, or lower "
                "--seq-len"
            )
        self.num_epochs, self._padding = packing.num_epochs(self.epoch_tokens), packing.padding(self.epoch_tokens)
        built = cache.arrays(
            self._key(),
            lambda report: packing.build(lengths, report),
            name=f"{dataset.prefix} ({split})",
            wanted=("document_index", "sample_index", "shuffle_index"),
        )
        self.document_index = built["document_index"]
        self.sample_index = built["sample_index"]
        self.shuffle_index = built["shuffle_index"]

    def _key(self) -> dict[str, object]:
        """What the indices depend on: the lengths of the sequences, which are in the .idx file, and the packing."""
        packing = {name: getattr(self.packing, name) for name in Packing.__dataclass_fields__}
        return {"kind": "packed samples", "index_sha256": self.dataset.index_sha256, **packing}

    @property
    def names(self) -> tuple[str, ...]:
        """The data set's prefix."""
        return (self.dataset.prefix,)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        """The data set."""
        return (self.dataset,)

    def taken(self, stop: int) -> NDArray[np.int64]:
        """``SampleSource.taken``."""
        return np.array([stop], dtype=np.int64)

    def __getitem__(self, index: int) -> Sample:
        row, data = self._row(index), self.dataset
        padding = self._padding if row == len(self) - 1 else 0
        found = np.empty(self.packing.seq_len + 1, dtype=np.int64)
        held = len(found) - padding
        found[held:] = 0
        order, place = self.document_index, self._range(row)
        read_sample(data.tokens, data.offsets, data.sequence_lengths, order, place, found[:held])
        return Sample(found, 0, padding)

    def spans(self, index: int) -> list[Span]:
        """``SampleSource.spans``; a sequence without tokens among them has an empty one."""
        return [Span(0, *piece) for piece in self._pieces(index)]

    def _row(self, index: int) -> int:
        """Where a sample stands in the sample index."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.dataset.prefix} ({self.split}): it has {len(self)}")
        return int(self.shuffle_index[index])

    def _range(self, row: int) -> tuple[int, int, int, int]:
        """Place in the document index and token there, of the first token of a row's sample and of its last."""
        (first, begin), (last, end) = self.sample_index[row : row + 2].tolist()
        return first, begin, last, end

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Sequence, start and stop of what a sample takes."""
        first, begin, last, end = self._range(self._row(index))
        sequences = self.document_index[first : last + 1]
        stops = self.dataset.sequence_lengths[sequences].tolist()
        stops[-1] = end + 1
        return list(zip(sequences.tolist(), [begin] + [0] * (last - first), stops, strict=True))

    def samples_with(self, source: int, sequence: int) -> NDArray[np.int64]:
        """``SampleSource.samples_with``: the document index, then the rows around a place in it, then their order."""
        assert source == 0, f"data set {source} of one"
        if self.dataset.sequence_lengths[sequence] == 0:
            return np.empty(0, dtype=np.int64)
        places, starts = np.flatnonzero(self.document_index == sequence), self.sample_index[:, 0]
        first = np.searchsorted(starts[1:], places, side="left")  # the first row that ends there or later
        stop = np.searchsorted(starts[:-1], places, side="right")
        wanted = np.zeros(len(self), dtype=np.bool_)
        for begin, end in zip(first, stop, strict=True):
            wanted[begin:end] = True
        return np.flatnonzero(wanted[self.shuffle_index]).astype(np.int64)

    def describe(self) -> str:
        """Prefix, split, tokens, epochs and samples in one line."""
        return (
            f"{self.dataset.prefix} ({self.split}): {self.packing.end - self.packing.first:,} sequences, "
            f"{self.epoch_tokens:,} tokens, {self.num_epochs} epoch{'s' if self.num_epochs > 1 else ''}, "
            f"{len(self):,} samples"
        )
