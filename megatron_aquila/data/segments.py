"""Sources one after the other: the parts of a run, or what is left of an index and the next one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.samples import Sample, SampleSource, Span


class SegmentedSource:
    """A ``SampleSource`` made of ranges of others, in their order, so that appending one moves no sample.

    ``names`` are those of all segments, each once, in the order of their first segment.

    Args:
        segments: sources and which of their samples count.
    """

    def __init__(self, segments: Sequence[tuple[SampleSource, range]]) -> None:
        assert len(segments) > 0, "a segmented source needs at least one segment"
        for source, numbers in segments:
            assert 0 <= numbers.start <= numbers.stop <= len(source), f"samples {numbers} of {len(source)}"
            assert numbers.step == 1, f"samples {numbers} in steps"
        pairs = [pair for source, _ in segments for pair in zip(source.names, source.datasets, strict=True)]
        self._datasets = dict(reversed(pairs))  # the first of a name wins
        self.names = tuple(dict.fromkeys(name for name, _ in pairs))
        self._sources = [source for source, _ in segments]
        self._numbers = [numbers for _, numbers in segments]
        self._places = [np.array([self.names.index(name) for name in source.names]) for source in self._sources]
        self._bounds = list(accumulate(map(len, self._numbers), initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    @property
    def datasets(self) -> tuple[IndexedDataset, ...]:
        """The data sets of ``names``."""
        return tuple(self._datasets[name] for name in self.names)

    def __getitem__(self, index: int) -> Sample:
        segment, number = self._place(index)
        sample = self._sources[segment][number]
        return replace(sample, source=int(self._places[segment][sample.source]))

    def spans(self, index: int) -> list[Span]:
        """``SampleSource.spans``."""
        segment, number = self._place(index)
        places = self._places[segment]
        return [
            Span(int(places[span.source]), span.sequence, span.start, span.stop)
            for span in self._sources[segment].spans(number)
        ]

    def samples_with(self, source: int, sequence: int) -> NDArray[np.int64]:
        """``SampleSource.samples_with``; samples of a segment that do not count are not among them."""
        found = [np.empty(0, dtype=np.int64)]
        for segment, (begin, places, counted) in enumerate(
            zip(self._bounds[:-1], self._places, self._numbers, strict=True)
        ):
            for own in np.flatnonzero(places == source).tolist():
                numbers = self._sources[segment].samples_with(own, sequence)
                inside = (numbers >= counted.start) & (numbers < counted.stop)
                found.append(begin - counted.start + numbers[inside])
        return np.concatenate(found)

    def taken(self, stop: int) -> NDArray[np.int64]:
        """``SampleSource.taken``."""
        total = np.zeros(len(self.names), dtype=np.int64)
        for segment, (begin, end) in enumerate(pairwise(self._bounds)):
            numbers, source = self._numbers[segment], self._sources[segment]
            last = numbers.start + min(max(stop - begin, 0), end - begin)
            np.add.at(total, self._places[segment], source.taken(last) - source.taken(numbers.start))
        return total

    def describe(self) -> str:
        """Each segment's description in turn."""
        return "\n".join(source.describe() for source in self._sources)

    def _place(self, index: int) -> tuple[int, int]:
        """The segment, and the number of the sample in its source."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        segment = bisect_right(self._bounds, index) - 1
        return segment, self._numbers[segment].start + index - self._bounds[segment]
