"""A document is left out for a reason that can be counted; which of equals is kept follows from their order alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.filters import START, Drop, LengthLimits, SeenHashes, hashes_of, text_hash
from megatron_aquila.errors import DataError


def test_lengths() -> None:
    limits = LengthLimits(min_chars=2, max_chars=3)
    found = [limits.dropped(texts) for texts in (("我",), ("我们",), ("a", "bc"), ("a", "bcd"), ())]
    assert found == [Drop.TOO_SHORT, None, None, Drop.TOO_LONG, Drop.TOO_SHORT]
    assert LengthLimits().dropped(()) is None
    assert LengthLimits(min_chars=0, max_chars=0).dropped(("",)) is None
    wrong = [str(p) for p in LengthLimits(min_chars=3, max_chars=-1).problems()]
    assert wrong == [
        "--max-chars -1: a length is not negative; use 0 or more",
        "--min-chars 3: no document is as long as that and not longer than --max-chars -1; use a range",
    ]
    assert limits.problems() == []


def test_hashes_tell_texts_apart() -> None:
    texts = [("",), ("a",), ("ab", ""), ("a", "b"), ("", "ab"), ("ab",), ("我",)]
    assert len({text_hash(each) for each in texts}) == len(texts)
    assert [len(text_hash(each)) for each in texts] == [16] * len(texts)
    assert text_hash(("我们",)).hex() == "8a6abb7e45208b2eece5d4ea9c7c8b8f"


# Words that want the same places: few low words, and the one next to the end of the table.
CROWDED = st.lists(st.tuples(st.sampled_from([0, 1, 2, START - 1, START]), st.integers(0, 3)), max_size=40)


@given(hashes=CROWDED, cuts=st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=50)
def test_the_first_of_equals_is_new_however_they_are_cut(hashes: list[tuple[int, int]], cuts: list[int]) -> None:
    rows = np.array(hashes, dtype=np.uint64).reshape(-1, 2)
    seen = SeenHashes()
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    found = np.concatenate([seen.add(rows[a:b]) for a, b in pairwise(bounds)])
    known: set[tuple[int, int]] = set()
    for row, is_new in zip(hashes, found, strict=True):
        row = (1, 1) if row == (0, 0) else row  # zeros are an empty place
        assert is_new == (row not in known)
        known.add(row)
    assert len(seen) == len(known)


def test_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_aquila.data.filters.BLOCK", 1000)
    generator = np.random.default_rng(0)
    rows = generator.integers(1 << 63, size=(3 * START, 2), dtype=np.uint64)
    seen = SeenHashes()
    assert seen.add(rows).all()
    assert not seen.add(rows[::-1]).any()
    seen.save(tmp_path / "hashes")
    assert (tmp_path / "hashes").stat().st_size == 16 * len(rows) == 16 * len(seen)
    again = SeenHashes()
    again.load(tmp_path / "hashes")
    assert not again.add(rows).any()
    assert again.add(rows + np.uint64(1)).all()


def test_digests_as_rows(tmp_path: Path) -> None:
    digests = [text_hash((text,)) for text in ("a", "b", "a")]
    assert hashes_of(digests).tobytes() == b"".join(digests)
    seen = SeenHashes()
    assert seen.add(hashes_of(digests)).tolist() == [True, True, False]
    assert seen.add(hashes_of([])).tolist() == []
    (tmp_path / "digests").write_bytes(b"".join(digests))
    again = SeenHashes()
    again.load(tmp_path / "digests")
    assert len(again) == 2


def test_files_of_hashes_that_cannot_be_used(tmp_path: Path) -> None:
    seen = SeenHashes()
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        seen.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be written: Is a directory"):
        seen.save(tmp_path)
    (tmp_path / "cut").write_bytes(b"x" * 17)
    with pytest.raises(DataError, match="cut: 17 bytes are no hashes of 16 bytes each"):
        seen.load(tmp_path / "cut")
