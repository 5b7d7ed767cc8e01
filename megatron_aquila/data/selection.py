"""What of a finished shard goes into the output: all of it, or the documents that are new to the corpus."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.filters import SeenHashes
from megatron_aquila.data.provenance import renumbered
from megatron_aquila.data.shards import BAD, HASHES, META, Counts

CHUNK: Final = 1 << 22  # bytes, or tokens, at once
LINES: Final = 1 << 12  # of provenance at once


@dataclass(frozen=True, slots=True)
class Selection:
    """The documents of the shard in ``folder`` that ``is_kept`` [documents] says; None: every one."""

    folder: Path
    is_kept: NDArray[np.bool_] | None

    def parts(self, name: str, dtype: np.dtype[Any], *, first: int, lines_before: int) -> Iterator[Any]:
        """One of the shard's streams for the output, as bytes and arrays end to end; memory is bounded.

        Args:
            name: of the stream.
            dtype: of tokens.
            first: the number that the first document gets.
            lines_before: records of its file before the shard's first.

        Raises:
            OSError: it cannot be read.
        """
        path, is_kept = self.folder / name, self.is_kept
        if name == META:
            yield from _lines(path, is_kept, first, lines_before)
        elif is_kept is None or name == BAD:
            with path.open("rb") as stream:
                while data := stream.read(CHUNK):
                    yield data
        elif name == HASHES:
            yield _hashes(path)[is_kept]
        elif name.endswith(".lengths"):
            yield np.fromfile(path, dtype="<i4")[is_kept]
        else:
            lengths = np.fromfile(path.with_suffix(".lengths"), dtype="<i4")
            yield from kept_tokens(_mapped(path, dtype), lengths, is_kept)

    def counts(self, counts: Counts, names: tuple[str, ...]) -> Counts:
        """What is selected of a shard that holds ``counts``."""
        if self.is_kept is None:
            return counts
        left_out = ~self.is_kept
        lengths = [np.fromfile(self.folder / f"{name}.lengths", dtype="<i4") for name in names]
        tokens = sum(int(each[left_out].sum(dtype=np.int64)) for each in lengths)
        documents = int(np.count_nonzero(left_out))
        return counts - Counts(documents=documents, tokens=tokens) + Counts(duplicates=documents)


def select(folder: Path, seen: SeenHashes | None) -> Selection:
    """The documents whose hashes were not ``seen``; they are from here on. All of them where nothing is compared."""
    if seen is None:
        return Selection(folder, None)
    is_new = seen.add(_hashes(folder / HASHES))
    return Selection(folder, None if is_new.all() else is_new)


def kept_tokens(
    tokens: NDArray[Any], lengths: NDArray[np.int32], is_kept: NDArray[np.bool_], chunk: int = CHUNK
) -> Iterator[NDArray[Any]]:
    """The tokens of the kept ones of documents that lie end to end, a chunk of them all at a time."""
    ends = np.cumsum(lengths, dtype=np.int64)
    for start in range(0, len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left")
        here = np.minimum(ends[first : last + 1], stop) - np.maximum(
            ends[first : last + 1] - lengths[first : last + 1], start
        )
        yield tokens[start:stop][np.repeat(is_kept[first : last + 1], here)]


def _lines(path: Path, is_kept: NDArray[np.bool_] | None, first: int, lines_before: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        kept = stream if is_kept is None else compress(stream, is_kept.tolist())
        lines = renumbered(kept, first, lines_before)
        while block := b"".join(islice(lines, LINES)):
            yield block


def _hashes(path: Path) -> NDArray[np.uint64]:
    return np.fromfile(path, dtype="<u8").reshape(-1, 2)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    empty = path.stat().st_size == 0  # which cannot be mapped
    return np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
