"""What is left out of a corpus before tokens: what is too short, too long, or was there before; counted by reason."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.errors import DataError, Problem

HASH_BYTES: Final = 16  # two of 10^10 documents share one by chance with probability 2e-19
START: Final = 1 << 12  # places of an empty table
BLOCK: Final = 1 << 18  # hashes looked at at once: what is held beside the table
DOMAIN: Final = b"aquila document"


class Drop(StrEnum):
    """Why a good document is left out."""

    TOO_SHORT = "shorter than --min-chars"
    TOO_LONG = "longer than --max-chars"
    DUPLICATE = "seen before"


class Dropped(NamedTuple):
    """A good document that is left out; ``num_bytes`` is the length of its record as it was read."""

    reason: Drop
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthLimits:
    """Characters (Unicode code points) that the texts of a document have together; None is no limit."""

    min_chars: int | None = None
    max_chars: int | None = None

    def dropped(self, texts: Sequence[str]) -> Drop | None:
        """Why a document is left out, or None where it stays."""
        length = sum(map(len, texts))
        if self.min_chars is not None and length < self.min_chars:
            return Drop.TOO_SHORT
        if self.max_chars is not None and length > self.max_chars:
            return Drop.TOO_LONG
        return None

    def problems(self) -> list[Problem]:
        """Limits that nothing can meet."""
        problems = []
        for flag, value in (("--min-chars", self.min_chars), ("--max-chars", self.max_chars)):
            if value is not None and value < 0:
                problems.append(Problem(flag, value, "a length is not negative", "use 0 or more"))
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            why = f"no document is as long as that and not longer than --max-chars {self.max_chars}"
            problems.append(Problem("--min-chars", self.min_chars, why, "use a range"))
        return problems


def text_hash(texts: Sequence[str]) -> bytes:
    """16 bytes of a document's texts, each with its length, so that ("ab", "") is not ("a", "b")."""
    if len(texts) == 1:
        return hashlib.blake2b(texts[0].encode("utf-8"), digest_size=HASH_BYTES, person=DOMAIN).digest()
    state = hashlib.blake2b(digest_size=HASH_BYTES, person=DOMAIN)
    for text in texts:
        data = text.encode("utf-8")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()


def hashes_of(digests: Sequence[bytes]) -> NDArray[np.uint64]:
    """Digests as rows of two words, as ``SeenHashes`` takes them; ``tobytes`` of it are the digests end to end."""
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


class SeenHashes:
    """The set of all hashes so far, 16 bytes each at a load of at most two thirds: 24 to 48 bytes a document.

    While it grows, the old table is there, too: 72 bytes a document then.

    An open table of two words a place, probed one place after another, a batch at a time.
    """

    def __init__(self) -> None:
        self._table = np.zeros((START, 2), dtype=np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the hashes were not there, [n, 2] -> [n]; they are from here on. Of equal ones the first is new.

        What is new depends on the order of the hashes over all calls, and not on how they are cut into calls.
        """
        blocks = [self._add(hashes[start : start + BLOCK]) for start in range(0, len(hashes), BLOCK)]
        return np.concatenate([np.zeros(0, dtype=np.bool_), *blocks])

    def _add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        hashes = np.where(hashes.any(axis=1, keepdims=True), hashes, np.uint64(1))  # zeros are an empty place
        _, first = np.unique(_words(hashes), return_index=True)
        while 3 * (self._count + len(first)) > 2 * len(self._table):
            self._grow()
        is_new = np.zeros(len(hashes), dtype=np.bool_)
        inserted = np.sort(first)
        is_new[inserted] = self._insert(hashes[inserted])
        self._count += int(np.count_nonzero(is_new))
        return is_new

    def _insert(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Distinct hashes into places that are free; which of them were not there."""
        mask = np.uint64(len(self._table) - 1)
        place = hashes[:, 0] & mask
        is_new = np.zeros(len(hashes), dtype=np.bool_)
        waiting = np.arange(len(hashes))
        while len(waiting) > 0:
            here = self._table[place[waiting]]
            is_free = ~here.any(axis=1)
            is_there = (here == hashes[waiting]).all(axis=1)
            claimed = np.zeros(len(waiting), dtype=np.bool_)
            _, winners = np.unique(place[waiting[is_free]], return_index=True)  # several may want the same place
            claimed[np.flatnonzero(is_free)[winners]] = True
            taken = waiting[claimed]
            self._table[place[taken]] = hashes[taken]
            is_new[taken] = True
            waits_here = is_free & ~claimed  # looks again: who won may not be its equal, so it goes on from here
            waiting, stays = waiting[~(claimed | is_there)], waits_here[~(claimed | is_there)]
            place[waiting] = np.where(stays, place[waiting], (place[waiting] + np.uint64(1)) & mask)
        return is_new

    def _grow(self) -> None:
        old = self._table
        self._table = np.zeros((2 * len(old), 2), dtype=np.uint64)
        for start in range(0, len(old), BLOCK):
            block = old[start : start + BLOCK]
            self._insert(block[block.any(axis=1)])

    def save(self, path: Path) -> None:
        """Write the hashes, 16 bytes each; the caller renames the file when the rest of its work is written, too.

        Raises:
            DataError: it cannot be written.
        """
        try:
            self._table[self._table.any(axis=1)].astype("<u8").tofile(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    def load(self, path: Path) -> None:
        """Add the hashes that ``save`` wrote, or any digests end to end.

        Raises:
            DataError: it cannot be read or is cut off.
        """
        try:
            words = np.fromfile(path, dtype="<u8")
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        if size % HASH_BYTES != 0:
            raise DataError(
                f"{path}: {size:,} bytes are no hashes of {HASH_BYTES} bytes each; remove it and begin again"
            )
        self.add(words.reshape(-1, 2))


def _words(hashes: NDArray[np.uint64]) -> NDArray[Any]:
    return np.ascontiguousarray(hashes).view(np.dtype([("low", np.uint64), ("high", np.uint64)])).reshape(-1)
