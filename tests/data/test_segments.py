"""Ranges of sources one after the other."""

from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.blend import Library, Share
from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.segments import SegmentedSource
from tests.data.test_trace import assert_is_what_was_read, write


@pytest.fixture
def library(tmp_path: Path) -> Library:
    for number, name in enumerate("ab"):
        write(tmp_path / name, [[40], [7], [23]], first=1000 * number)
    return Library(seq_len=3, seed=1, cache=IndexCache(folder=tmp_path / "cache"))


def test_ranges_follow_each_other(library: Library, tmp_path: Path) -> None:
    a, b = (library.samples(str(tmp_path / name), Share("train"), None) for name in "ab")
    joined = SegmentedSource([(b, range(5)), (a, range(3, 7)), (b, range(5, 8))])
    assert [Path(name).name for name in joined.names] == ["b", "a"]
    expected = [b[i] for i in range(5)] + [a[i] for i in range(3, 7)] + [b[i] for i in range(5, 8)]
    assert [joined[i].tokens.tolist() for i in range(12)] == [sample.tokens.tolist() for sample in expected]
    assert [joined[i].source for i in range(12)] == [0] * 5 + [1] * 4 + [0] * 3
    assert [joined.taken(stop).tolist() for stop in (0, 4, 7, 12)] == [[0, 0], [4, 0], [5, 2], [8, 4]]
    assert joined.describe() == "\n".join([b.describe(), a.describe(), b.describe()])
    assert_is_what_was_read(joined)
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"sample {index} of 12"):
            joined[index]


def test_ranges_outside(library: Library, tmp_path: Path) -> None:
    a = library.samples(str(tmp_path / "a"), Share("train"), None)
    for numbers in (range(2, len(a) + 1), range(0, 4, 2)):
        with pytest.raises(AssertionError, match="samples range"):
            SegmentedSource([(a, numbers)])
    assert np.array_equal(SegmentedSource([(a, range(2, 2)), (a, range(2))])[0].tokens, a[0].tokens)
