"""What training reads from its first sample to its last: a blend, others from later samples on, and no source anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from megatron_aquila.data.blend import Blend, Library, Share, normalized, parse_blend
from megatron_aquila.data.samples import PackedSamples, SampleSource
from megatron_aquila.data.segments import SegmentedSource
from megatron_aquila.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """From the sample ``start`` of the run on it reads ``paths``, written as ``--data-path`` is."""

    start: int
    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """The samples from ``start`` to ``stop`` of a run, all of one blend."""

    start: int
    stop: int
    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How much of a data set a run reads: ``samples`` of the run, its ``tokens``, and how often each comes."""

    samples: float
    tokens: int
    epochs: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The samples of a run, and what it reads of each data set, by prefix."""

    source: SegmentedSource
    readings: Mapping[str, Reading]


def legs_of(phases: Sequence[Phase], segments: Sequence[int]) -> list[Leg]:
    """The legs of a run with the index segments of ``TrainState``: where a phase or the first segment ends, one ends.

    Sample i of a leg does not depend on where the leg stops: a run that is extended goes on with its last blend.
    """
    assert phases[0].start == 0, f"the first phase starts at sample {phases[0].start}"
    total = sum(segments)
    bounds = [min(phase.start, total) for phase in phases] + [total]
    legs = [
        Leg(start=start, stop=stop, paths=phase.paths)
        for phase, (start, stop) in zip(phases, pairwise(bounds), strict=True)
    ]
    border = min(legs[0].stop, segments[0])
    legs[:1] = [replace(legs[0], stop=border), replace(legs[0], start=border)]
    return [leg for leg in legs if leg.start < leg.stop]


def expected_readings(library: Library, legs: Sequence[Leg], share: Share) -> dict[str, Reading]:
    """What a run reads of each data set, from weights, sizes and lengths alone: no index is built."""
    samples: dict[str, float] = {}
    for leg in legs:
        prefixes, weights = parse_blend(leg.paths)
        if weights is None:
            weights = [library.epoch_samples(prefix, share) for prefix in prefixes] if len(prefixes) > 1 else [1]
        for prefix, weight in zip(prefixes, normalized(weights).tolist(), strict=True):
            samples[prefix] = samples.get(prefix, 0) + weight * (leg.stop - leg.start)
    tokens = {prefix: library.epoch_tokens(prefix, share) for prefix in samples}
    return {
        prefix: Reading(samples=count, tokens=tokens[prefix], epochs=count * library.seq_len / tokens[prefix])
        for prefix, count in samples.items()
    }


def check_epochs(readings: Mapping[str, Reading], limits: Mapping[str, float], *, seq_len: int) -> None:
    """Raise ``DataError`` naming every data set that would be read more often than its limit, and what would do."""
    wrong = []
    for prefix, reading in readings.items():
        limit = limits.get(prefix)
        if limit is not None and reading.epochs > limit:
            fits = int(limit * reading.tokens / seq_len)
            wrong.append(
                f"{prefix}: {reading.samples:,.0f} samples of its {reading.tokens:,} tokens are {reading.epochs:.3g} "
                f"epochs, more than {limit:g}; {fits:,} samples would do"
            )
    if wrong:
        raise DataError(
            "--max-epochs-per-source: " + ";\n  ".join(wrong) + ": lower its weight or --train-samples, or allow more"
        )


def build_course(
    library: Library,
    phases: Sequence[Phase],
    share: Share,
    *,
    segments: Sequence[int],
    limits: Mapping[str, float] | None = None,
) -> Course:
    """The samples of a run, as a function of the seed, ``segments[0]``, the phases and the data alone.

    Up to ``segments[0]``, or the second phase, they are Megatron-LM's for an index of that length. From there on each
    data set is read on where it stood: first what its index has left, then epoch after epoch, each in an order of its
    own. So nothing that was seen moves when later phases change or the run is extended, and nothing comes again before
    the rest of its data set has come. A blend without weights reads what is left once.

    Args:
        library: the data sets.
        phases: blends by their first samples, ascending from 0.
        share: the part of each data set that is trained on.
        segments: as in ``TrainState.index_segments``: the length of the first index, and of what was appended.
        limits: the largest number of epochs, by prefix.

    Raises:
        DataError: a limit does not hold, a blend without weights has too few samples, or as ``build_datasets``.
    """
    legs = legs_of(phases, segments)
    readings = expected_readings(library, legs, share)
    check_epochs(readings, limits or {}, seq_len=library.seq_len)
    first = library.blend(legs[0].paths, share, segments[0])
    _check_length(legs[0], len(first))
    parts = [(first, range(legs[0].stop))]
    shelf = {part.names[0]: _Volume(library, share, part) for part in _packed(first)}
    _move_on(shelf, first, legs[0].stop)
    for leg in legs[1:]:
        source = _blend_on(library, share, shelf, leg)
        parts.append((source, range(leg.stop - leg.start)))
        _move_on(shelf, source, leg.stop - leg.start)
    return Course(source=SegmentedSource(parts), readings=readings)


def describe_course(course: Course, phases: Sequence[Phase]) -> str:
    """Where the blend changes, and the epochs of each data set, a line each."""
    changes = [f"from sample {phase.start:,} on: {' '.join(phase.paths)}" for phase in phases[1:]]
    epochs = [
        f"  {reading.epochs:7.2f} epochs of {prefix}: {reading.samples:,.0f} samples of its {reading.tokens:,} tokens"
        for prefix, reading in course.readings.items()
    ]
    return "\n".join([*changes, f"the run of {len(course.source):,} samples reads", *epochs])


class _Volume:
    """A data set that is read on and on, and how many of its samples were taken."""

    def __init__(self, library: Library, share: Share, first: PackedSamples) -> None:
        self._library, self._share, self._packs = library, share, [first]
        self.taken = 0

    @property
    def left(self) -> int:
        """Samples until the data set starts over."""
        return sum(map(len, self._packs)) - self.taken

    def onward(self, count: int) -> SegmentedSource:
        """The next ``count`` samples, over as many epochs as that takes."""
        while self.left < count:
            prefix = self._packs[0].names[0]
            self._packs.append(self._library.samples(prefix, self._share, None, order=len(self._packs)))
        bounds = accumulate(map(len, self._packs), initial=0)
        ranges = [
            (pack, range(max(self.taken - start, 0), min(self.taken + count - start, stop - start)))
            for pack, (start, stop) in zip(self._packs, pairwise(bounds), strict=True)
        ]
        return SegmentedSource([(pack, numbers) for pack, numbers in ranges if len(numbers) > 0])


def _blend_on(library: Library, share: Share, shelf: dict[str, _Volume], leg: Leg) -> SampleSource:
    """A later leg's samples: of each data set those that come next."""
    prefixes, weights = parse_blend(leg.paths)
    for prefix in prefixes:
        if prefix not in shelf:
            shelf[prefix] = _Volume(library, share, library.samples(prefix, share, None))
    volumes, size = [shelf[prefix] for prefix in prefixes], leg.stop - leg.start
    if len(volumes) == 1:
        return volumes[0].onward(size)
    if weights is None:
        left = [volume.left for volume in volumes]
        _check_length(leg, sum(left))
        parts = [volume.onward(count) for volume, count in zip(volumes, left, strict=True) if count > 0]
        return Blend(parts, [len(part) for part in parts], size, library.cache)
    # The furthest behind its weight is taken, so that none is ever more than one sample ahead.
    needs = [int(weight * size) + 2 for weight in normalized(weights).tolist()]
    parts = [volume.onward(need) for volume, need in zip(volumes, needs, strict=True)]
    return Blend(parts, weights, size, library.cache)


def _check_length(leg: Leg, available: int) -> None:
    if available < leg.stop - leg.start:
        raise DataError(
            f"--data-path {' '.join(leg.paths)}: without weights each sample is read once, and from sample {leg.start} "
            f"to {leg.stop} of the run there are {available}; give weights, with which data sets are read again, or "
            f"--train-samples {leg.start + available}"
        )


def _packed(source: SampleSource) -> list[PackedSamples]:
    """What a blend, or a single data set's samples, is made of."""
    parts = source.parts if isinstance(source, Blend) else (source,)
    return [part for part in parts if isinstance(part, PackedSamples)]


def _move_on(shelf: Mapping[str, _Volume], source: SampleSource, stop: int) -> None:
    for prefix, count in zip(source.names, np.asarray(source.taken(stop)).tolist(), strict=True):
        shelf[prefix].taken += count
