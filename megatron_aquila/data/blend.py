"""From ``--data-path`` and ``--split`` to the samples of training, validation and test."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.native import build_blending_indices, build_exhaustive_blending_indices
from megatron_aquila.data.progress import Report, ignore
from megatron_aquila.data.samples import PackedSamples, Packing, Sample, SampleSource, Span, tokens_between
from megatron_aquila.errors import DataError

SPLITS: Final = ("train", "valid", "test")
SURPLUS: Final = 0.005  # Megatron-LM builds this much more of each data set than the blend should need
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Share:
    """A split's part of every data set: ``name`` for people, ``span`` of its sequences, ``Packing.keep_partial``."""

    name: str
    span: Range = (0.0, 1.0)
    keep_partial: bool = False


@dataclass(frozen=True, slots=True)
class Splits:
    """What to train on, to validate on and to test on; ``None`` where ``--split`` gives no share."""

    train: SampleSource | None
    valid: SampleSource | None
    test: SampleSource | None


class Blend:
    """Samples of several data sets in fixed proportions: a ``SampleSource`` with a name a data set.

    Attributes: ``dataset_index`` (int16) and ``dataset_sample_index`` (int64), one entry a sample.

    Args:
        parts: the data sets' samples.
        weights: their proportions, of any sum; the sizes of the parts when ``size`` is ``None``.
        size: samples of the blend; ``None``: every sample of every part once.
        cache: where the two indices are kept.
    """

    def __init__(
        self, parts: Sequence[SampleSource], weights: Sequence[float], size: int | None, cache: IndexCache
    ) -> None:
        self.parts, self.weights = tuple(parts), tuple(weights)
        supply = [len(part) for part in parts]
        key = {"kind": "blend", "weights": [float(weight).hex() for weight in weights], "supply": supply, "size": size}

        def build(report: Report) -> Iterator[tuple[str, NDArray[Any]]]:
            report("samples", 0, sum(supply) if size is None else size)
            if size is None:
                dataset, sample = build_exhaustive_blending_indices(np.array(weights, dtype=np.int64))
            else:
                dataset, sample = build_blending_indices(normalized(weights), size)
            self._check_supply(dataset)
            yield "dataset_index", dataset
            yield "dataset_sample_index", sample

        names = ("dataset_index", "dataset_sample_index")
        built = cache.arrays(key, build, name=f"blend of {len(parts)} data sets", wanted=names)
        self.dataset_index, self.dataset_sample_index = (built[name] for name in names)

    def _check_supply(self, dataset_index: NDArray[np.int16]) -> None:
        """The indices never ask a part for a sample it does not have."""
        asked = np.bincount(dataset_index, minlength=len(self.parts)).tolist()
        for part, count in zip(self.parts, asked, strict=True):
            if count > len(part):
                raise DataError(
                    f"{part.names[0]}: the blend takes {count} samples, but there are {len(part)}; ask for a longer "
                    "blend, or give this data set another weight"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets' prefixes, in the order of ``--data-path``."""
        return tuple(part.names[0] for part in self.parts)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        source = int(self.dataset_index[index])
        return replace(self.parts[source][int(self.dataset_sample_index[index])], source=source)

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        """The data sets of ``names``."""
        return tuple(part.datasets[0] for part in self.parts)

    def taken(self, stop: int) -> NDArray[np.int64]:
        """``SampleSource.taken``."""
        return np.bincount(self.dataset_index[:stop], minlength=len(self.parts)).astype(np.int64)

    def spans(self, index: int) -> list[Span]:
        """``SampleSource.spans``."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        source = int(self.dataset_index[index])
        return [
            replace(span, source=source) for span in self.parts[source].spans(int(self.dataset_sample_index[index]))
        ]

    def samples_with(self, source: int, sequence: int) -> NDArray[np.int64]:
        """``SampleSource.samples_with``."""
        wanted = np.zeros(len(self.parts[source]), dtype=np.bool_)
        wanted[self.parts[source].samples_with(0, sequence)] = True
        own = np.flatnonzero(self.dataset_index == source)
        return np.asarray(own[wanted[self.dataset_sample_index[own]]], dtype=np.int64)

    def describe(self) -> str:
        """A line for the blend and one a data set."""
        shares = normalized(self.weights)
        lines = [f"  {share:7.2%} {part.describe()}" for share, part in zip(shares, self.parts, strict=True)]
        return "\n".join([f"blend of {len(self.parts)} data sets, {len(self):,} samples:", *lines])


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """The data sets of a run, each opened once, and how samples of ``seq_len + 1`` tokens are cut from them."""

    seq_len: int
    seed: int
    cache: IndexCache
    opened: dict[str, IndexedDataset] = field(default_factory=dict)

    def dataset(self, prefix: str) -> IndexedDataset:
        """The data set of a prefix. Raises ``DataError`` where it is missing or damaged."""
        if prefix not in self.opened:
            self.opened[prefix] = IndexedDataset(prefix)
        return self.opened[prefix]

    def epoch_tokens(self, prefix: str, share: Share) -> int:
        """Tokens of a data set's share. Raises ``DataError`` where there is none."""
        dataset = self.dataset(prefix)
        return tokens_between(dataset, *_cut(share.span, len(dataset)), split=share.name)

    def epoch_samples(self, prefix: str, share: Share) -> int:
        """Whole samples in one epoch of a data set's share; raises as ``epoch_tokens``."""
        return (self.epoch_tokens(prefix, share) - 1) // self.seq_len

    def samples(self, prefix: str, share: Share, num_samples: int | None, *, order: int = 0) -> PackedSamples:
        """At least ``num_samples``, or those of one epoch, of a data set's share; ``order`` counts its indices."""
        dataset = self.dataset(prefix)
        first, end = _cut(share.span, len(dataset))
        packing = Packing(
            first=first,
            end=end,
            num_samples=num_samples,
            seq_len=self.seq_len,
            seed=(self.seed + order) % 2**32,
            keep_partial=share.keep_partial,
        )
        return PackedSamples(dataset, packing, self.cache, split=share.name)

    def blend(self, paths: Sequence[str], share: Share, size: int | None) -> SampleSource:
        """Samples of what ``paths`` name, with Megatron-LM's values: the first ``size`` count, or all are wanted once.

        Raises:
            DataError: weights without a ``size``, and as ``build_datasets``.
        """
        prefixes, weights = parse_blend(paths)
        if weights is None:
            parts = [self.samples(prefix, share, size if len(prefixes) == 1 else None) for prefix in prefixes]
            lengths = [len(part) for part in parts]
            return parts[0] if len(parts) == 1 else Blend(parts, lengths, _at_most(size, sum(lengths)), self.cache)
        if size is None:
            raise DataError("--data-path: a blend with weights needs a number of samples for every split")
        shares = normalized(weights).tolist()
        targets = [math.ceil(size * weight) for weight in shares]
        parts = [
            self.samples(prefix, share, math.ceil(target * (1 + SURPLUS)))
            for prefix, target in zip(prefixes, targets, strict=True)
        ]
        return Blend(parts, shares, sum(targets), self.cache)


def open_library(
    paths: Sequence[str],
    *,
    seq_len: int,
    seed: int,
    cache_path: Path | None,
    build: bool = True,
    report: Report = ignore,
    opened: dict[str, IndexedDataset] | None = None,
) -> Library:
    """A library whose indices are kept in ``cache_path``, by default in ``cache`` beside the first of ``paths``.

    Arguments as for ``build_datasets``; ``opened`` are data sets that are open, to which others are added.
    """
    folder = Path(parse_blend(paths)[0][0]).parent / "cache" if cache_path is None else cache_path
    cache = IndexCache(folder=folder, build=build, report=report)
    return Library(seq_len=seq_len, seed=seed, cache=cache, opened={} if opened is None else opened)


def build_datasets(
    paths: Sequence[str],
    *,
    sizes: tuple[int | None, int | None, int | None],
    split: str,
    seq_len: int,
    seed: int,
    cache_path: Path | None,
    build: bool = True,
    report: Report = ignore,
) -> Splits:
    """The samples of each split, in an order that is a function of the arguments and the data alone.

    Index values equal Megatron-LM's. No communication: where several processes share ``cache_path``, let one of them
    build, and the others call with ``build=False`` afterwards.

    Args:
        paths: one prefix; or ``weight prefix weight prefix ...``; or several prefixes, blended by size.
        sizes: samples wanted of train, valid and test; ``None`` is every sample once, for data sets without weights.
        split: shares of the sequences of each data set, such as ``"99,1,0"``.
        seq_len: tokens of a sample, one less than it carries.
        seed: of the shuffles.
        cache_path: folder of the built indices; default ``cache`` beside the first data set.
        build: build what is missing, or wait for another process to do so.
        report: is told how far a build is.

    Raises:
        DataError: a path, weight or share makes no sense, a file is damaged, or a wanted split holds no tokens.
    """
    library = open_library(paths, seq_len=seq_len, seed=seed, cache_path=cache_path, build=build, report=report)
    train, valid, test = [
        None if share is None else library.blend(paths, share, size)
        for share, size in zip(shares_of(split), sizes, strict=True)
    ]
    return Splits(train, valid, test)


def alone(paths: Sequence[str]) -> Sequence[str]:
    """A lone data set without its weight: in a split's own blend it is no blend, and Megatron-LM builds none."""
    prefixes, _ = parse_blend(paths)
    return prefixes if len(prefixes) == 1 else paths


def describe_data(paths: Sequence[str], split: str) -> list[dict[str, Any]]:
    """What the samples of ``build_datasets`` are made of, as plain JSON: for each data set in order

    - ``weight``: its share of the blend, of all shares 1; ``None`` where no weights are given;
    - ``sequences`` and ``tokens``: how many it holds;
    - ``splits``: the first and end sequence of ``train``, ``valid`` and ``test``, ``None`` for one without a share;
    - ``index_sha256``: SHA-256 of its .idx file.

    No paths: data that was moved is the same data.

    Raises:
        DataError: as ``build_datasets``, where a path, a weight or a share makes no sense, or a file is damaged.
    """
    prefixes, weights = parse_blend(paths)
    shares = [None] * len(prefixes) if weights is None else normalized(weights).tolist()
    ranges = split_ranges(split)
    described = []
    for prefix, share in zip(prefixes, shares, strict=True):
        dataset = IndexedDataset(prefix)
        cuts = [None if span is None else list(_cut(span, len(dataset))) for span in ranges]
        described.append(
            {
                "weight": share,
                "sequences": len(dataset),
                "tokens": len(dataset.tokens),
                "splits": dict(zip(SPLITS, cuts, strict=True)),
                "index_sha256": dataset.index_sha256,
            }
        )
    return described


def parse_blend(paths: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of ``--data-path``; weights are ``None`` where none are given.

    Raises:
        DataError: nothing given, weights for some prefixes only, a weight that is not a positive number, or a prefix
            twice.
    """
    if len(paths) == 0:
        raise DataError("--data-path: no data set given; give the prefix of a .bin/.idx pair")
    weights = [_number(path) for path in paths[::2]]
    if len(paths) == 1 or all(weight is None for weight in weights):
        return _once(paths), None
    if len(paths) % 2 != 0:
        raise DataError(f"--data-path {' '.join(paths)}: weights and prefixes do not pair up; give a weight to each")
    given = []
    for written, weight in zip(paths[::2], weights, strict=True):
        if weight is None or not 0 < weight < math.inf:
            raise DataError(f"--data-path: the weight {written!r} is not a positive number; give weight prefix pairs")
        given.append(weight)
    return _once(paths[1::2]), given


def _once(prefixes: Sequence[str]) -> list[str]:
    """The prefixes; raises ``DataError`` where one stands twice, whose samples would be read twice as often."""
    seen = set[str]()
    for prefix in prefixes:
        if os.path.normpath(prefix) in seen:
            raise DataError(f"--data-path: {prefix} is named twice; name it once, with the sum of its weights")
        seen.add(os.path.normpath(prefix))
    return list(prefixes)


def shares_of(split: str) -> tuple[Share | None, Share | None, Share | None]:
    """``split_ranges`` as the shares of train, valid and test."""
    train, valid, test = (
        None if span is None else Share(name, span) for name, span in zip(SPLITS, split_ranges(split), strict=True)
    )
    return train, valid, test


def split_ranges(split: str) -> tuple[Range | None, Range | None, Range | None]:
    """Where each split begins and ends, as shares of a data set; ``"99,1,0"`` gives (0, 0.99), (0.99, 1), ``None``.

    Raises:
        DataError: not one to three shares, a negative one, or all zero.
    """
    shares = [_number(part) for part in split.split(",")]
    given = [share for share in shares if share is not None and 0 <= share < math.inf]
    if not len(shares) == len(given) <= len(SPLITS) or sum(given) == 0:
        raise DataError(f"--split {split}: give one to three shares of train, valid and test, such as 99,1,0")
    bounds = list(accumulate(normalized(given + [0.0] * (len(SPLITS) - len(given))).tolist(), initial=0.0))
    train, valid, test = [(low, high) if high > low else None for low, high in pairwise(bounds)]
    return train, valid, test


def _cut(span: Range, count: int) -> tuple[int, int]:
    """The first and end of ``count`` sequences that a split's share means."""
    first, end = (round(bound * count) for bound in span)
    return first, end


def normalized(weights: Sequence[float]) -> NDArray[np.float64]:
    """The weights, divided by their sum."""
    values: NDArray[np.float64] = np.array(weights, dtype=np.float64)
    return values / float(values.sum())


def _at_most(size: int | None, limit: int) -> int | None:
    return None if size is None else min(size, limit)


def _number(written: str) -> float | None:
    try:
        return float(written)
    except ValueError:
        return None
