"""From ``--data-path`` and ``--split`` to the samples of training, validation and test."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.native import build_blending_indices, build_exhaustive_blending_indices
from megatron_aquila.data.progress import Report, ignore
from megatron_aquila.data.samples import PackedSamples, Packing, Sample, SampleSource, Span
from megatron_aquila.errors import DataError

SPLITS: Final = ("train", "valid", "test")
SURPLUS: Final = 0.005  # Megatron-LM builds this much more of each data set than the blend should need
Range = tuple[float, float]


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
        self, parts: Sequence[PackedSamples], weights: Sequence[float], size: int | None, cache: IndexCache
    ) -> None:
        self.parts, self.weights = tuple(parts), tuple(weights)
        supply = [len(part) for part in parts]
        key = {"kind": "blend", "weights": [float(weight).hex() for weight in weights], "supply": supply, "size": size}

        def build(report: Report) -> Iterator[tuple[str, NDArray[Any]]]:
            report("samples", 0, sum(supply) if size is None else size)
            if size is None:
                dataset, sample = build_exhaustive_blending_indices(np.array(weights, dtype=np.int64))
            else:
                dataset, sample = build_blending_indices(_normalized(weights), size)
            self._check_supply(dataset)
            yield "dataset_index", dataset
            yield "dataset_sample_index", sample

        built = cache.arrays(key, build, name=f"blend of {len(parts)} data sets")
        self.dataset_index, self.dataset_sample_index = built["dataset_index"], built["dataset_sample_index"]

    def _check_supply(self, dataset_index: NDArray[np.int16]) -> None:
        """The indices never ask a part for a sample it does not have."""
        for number, part in enumerate(self.parts):
            asked = int(np.count_nonzero(dataset_index == number))
            if asked > len(part):
                raise DataError(
                    f"{part.names[0]}: the blend takes {asked} samples of the {part.split} split, but it has "
                    f"{len(part)}; ask for a longer blend, or give this data set another weight"
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
        return Sample(self.parts[source][int(self.dataset_sample_index[index])].tokens, source)

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        """The data sets of ``names``."""
        return tuple(part.dataset for part in self.parts)

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
        shares = _normalized(self.weights)
        lines = [f"  {share:7.2%} {part.describe()}" for share, part in zip(shares, self.parts, strict=True)]
        return "\n".join([f"blend of {len(self.parts)} data sets, {len(self):,} samples:", *lines])


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
    blend = _Blend(paths)
    cache = _cache(blend, cache_path, build, report)
    ranges = split_ranges(split)

    def source(number: int) -> SampleSource | None:
        span = ranges[number]
        if span is None:
            return None
        return blend.samples(number, span, sizes[number], seq_len=seq_len, seed=seed, cache=cache)

    return Splits(source(0), source(1), source(2))


def build_datasets_per_split(
    paths: tuple[Sequence[str], Sequence[str], Sequence[str]],
    *,
    sizes: tuple[int | None, int | None, int | None],
    seq_len: int,
    seed: int,
    cache_path: Path | None,
    build: bool = True,
    report: Report = ignore,
) -> Splits:
    """As ``build_datasets``, each split with data sets of its own, of which it takes all; empty: there is none."""

    def source(number: int) -> SampleSource | None:
        if len(paths[number]) == 0:
            return None
        blend = _Blend(paths[number])
        cache = _cache(blend, cache_path, build, report)
        return blend.samples(number, (0, 1), sizes[number], seq_len=seq_len, seed=seed, cache=cache)

    return Splits(source(0), source(1), source(2))


class _Blend:
    """The data sets of ``--data-path``, opened, and their shares."""

    def __init__(self, paths: Sequence[str]) -> None:
        prefixes, weights = parse_blend(paths)
        self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        self.shares = None if weights is None else _normalized(weights).tolist()

    def samples(
        self, number: int, span: Range, size: int | None, *, seq_len: int, seed: int, cache: IndexCache
    ) -> SampleSource:
        """At least ``size`` samples of split ``number``, which takes the share ``span`` of each data set."""

        def packed(dataset: IndexedDataset, num_samples: int | None) -> PackedSamples:
            first, end = _cut(span, len(dataset))
            packing = Packing(first=first, end=end, num_samples=num_samples, seq_len=seq_len, seed=seed)
            return PackedSamples(dataset, packing, cache, split=SPLITS[number])

        if self.shares is None:
            wanted = size if len(self.datasets) == 1 else None
            parts = [packed(dataset, wanted) for dataset in self.datasets]
            lengths = [len(part) for part in parts]
            return parts[0] if len(parts) == 1 else Blend(parts, lengths, _at_most(size, sum(lengths)), cache)
        if size is None:
            raise DataError("--data-path: a blend with weights needs a number of samples for every split")
        targets = [math.ceil(size * share) for share in self.shares]
        wanted_of = zip(self.datasets, targets, strict=True)
        parts = [packed(dataset, math.ceil(target * (1 + SURPLUS))) for dataset, target in wanted_of]
        return Blend(parts, self.shares, sum(targets), cache)


def _cache(blend: _Blend, cache_path: Path | None, build: bool, report: Report) -> IndexCache:
    beside = Path(blend.datasets[0].prefix).parent / "cache"
    return IndexCache(folder=beside if cache_path is None else cache_path, build=build, report=report)


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
    shares = [None] * len(prefixes) if weights is None else _normalized(weights).tolist()
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
        DataError: nothing given, weights for some prefixes only, or a weight that is not a positive number.
    """
    if len(paths) == 0:
        raise DataError("--data-path: no data set given; give the prefix of a .bin/.idx pair")
    weights = [_number(path) for path in paths[::2]]
    if len(paths) == 1 or all(weight is None for weight in weights):
        return list(paths), None
    if len(paths) % 2 != 0:
        raise DataError(f"--data-path {' '.join(paths)}: weights and prefixes do not pair up; give a weight to each")
    given = []
    for written, weight in zip(paths[::2], weights, strict=True):
        if weight is None or not 0 < weight < math.inf:
            raise DataError(f"--data-path: the weight {written!r} is not a positive number; give weight prefix pairs")
        given.append(weight)
    return list(paths[1::2]), given


def split_ranges(split: str) -> tuple[Range | None, Range | None, Range | None]:
    """Where each split begins and ends, as shares of a data set; ``"99,1,0"`` gives (0, 0.99), (0.99, 1), ``None``.

    Raises:
        DataError: not one to three shares, a negative one, or all zero.
    """
    shares = [_number(part) for part in split.split(",")]
    given = [share for share in shares if share is not None and 0 <= share < math.inf]
    if not len(shares) == len(given) <= len(SPLITS) or sum(given) == 0:
        raise DataError(f"--split {split}: give one to three shares of train, valid and test, such as 99,1,0")
    bounds = list(accumulate(_normalized(given + [0.0] * (len(SPLITS) - len(given))).tolist(), initial=0.0))
    train, valid, test = [(low, high) if high > low else None for low, high in pairwise(bounds)]
    return train, valid, test


def _cut(span: Range, count: int) -> tuple[int, int]:
    """The first and end of ``count`` sequences that a split's share means."""
    first, end = (round(bound * count) for bound in span)
    return first, end


def _normalized(weights: Sequence[float]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.array(weights, dtype=np.float64)
    return values / float(values.sum())


def _at_most(size: int | None, limit: int) -> int | None:
    return None if size is None else min(size, limit)


def _number(written: str) -> float | None:
    try:
        return float(written)
    except ValueError:
        return None
