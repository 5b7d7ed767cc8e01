"""Token sequences on disk in Megatron-LM's MMIDIDX format: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` where they are.

The index, little-endian: ``b"MMIDIDX\\0\\0"``, version (uint64, 1), dtype code (uint8), number of sequences (uint64),
number of document boundaries (uint64); then per sequence its length (int32) and byte offset (int64), the boundaries
(int64, in sequences, the first 0, the last the number of sequences), and optionally a mode (int8) per sequence.
"""

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron_aquila.data.hashed import HashedFile
from megatron_aquila.data.manifest import (
    Contents,
    Manifest,
    Origin,
    manifest_path,
    read_manifest,
    remove_manifest,
    store_manifest,
)
from megatron_aquila.data.temporary import temporary_path
from megatron_aquila.errors import DataError

MAGIC: Final = b"MMIDIDX\x00\x00"
VERSION: Final = 1
HEADER: Final = struct.Struct("<QBQQ")  # after the magic: version, dtype code, sequences, document boundaries
CODE_OF_DTYPE: Final = {
    np.dtype(name): code for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
DTYPE_OF_CODE: Final = {code: dtype for dtype, code in CODE_OF_DTYPE.items()}
BLOCK: Final = 1 << 20  # sequences whose offsets are checked or written at once, tokens that are copied at once


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM stores a vocabulary in: uint16 below 65,500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """Sequences of ``prefix``, read through mmap. Everything that is cheap to check is checked when it is opened.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: of the stored tokens.
        sequence_lengths: int32, tokens of each sequence.
        offsets: int64, byte of ``.bin`` at which each sequence begins.
        document_indices: int64, first sequence of each document, then the number of sequences.
        modes: int8 per sequence, or ``None``.
        manifest: what the data set says of itself; ``None`` for one of another program.

    Raises:
        DataError: a file is missing or unreadable, is not of this format, or the files do not fit each other.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.idx_path, self.bin_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        mapped = _map(self.idx_path)
        index = np.frombuffer(mapped, dtype=np.uint8)
        header_end = len(MAGIC) + HEADER.size
        if index[: len(MAGIC)].tobytes() != MAGIC:
            raise DataError(f"{self.idx_path}: offset 0 does not hold MMIDIDX: this is not an index of a token file")
        if len(index) < header_end:
            raise DataError(f"{self.idx_path}: cut off in the header, at byte {len(index)} of {header_end}")
        version, code, num_sequences, num_boundaries = HEADER.unpack(index[len(MAGIC) : header_end].tobytes())
        if version != VERSION:
            raise DataError(f"{self.idx_path}: version {version} at offset {len(MAGIC)}; only {VERSION} is known")
        if code not in DTYPE_OF_CODE:
            raise DataError(f"{self.idx_path}: unknown dtype code {code} at offset {len(MAGIC) + 8}")
        self.dtype = DTYPE_OF_CODE[code]
        ends = list(accumulate((header_end, num_sequences * 4, num_sequences * 8, num_boundaries * 8)))
        if len(index) not in (ends[3], ends[3] + num_sequences):
            raise DataError(
                f"{self.idx_path}: {len(index)} bytes, but {num_sequences} sequences and {num_boundaries} document "
                f"boundaries take {ends[3]}, or {ends[3] + num_sequences} with modes; write the data set again"
            )
        self.sequence_lengths: NDArray[np.int32] = index[ends[0] : ends[1]].view("<i4")
        self.offsets: NDArray[np.int64] = index[ends[1] : ends[2]].view("<i8")
        self.document_indices: NDArray[np.int64] = index[ends[2] : ends[3]].view("<i8")
        has_modes = len(index) > ends[3]
        self.modes: NDArray[np.int8] | None = index[ends[3] :].view(np.int8) if has_modes else None
        self._check_documents()
        size = self._check_sequences()
        tokens = np.frombuffer(_map(self.bin_path), dtype=np.uint8)
        if len(tokens) != size:
            raise DataError(
                f"{self.bin_path}: {len(tokens)} bytes, but {self.idx_path} describes {size} of {self.dtype}; "
                "one of them is cut off, or they belong to different data sets: write the data set again"
            )
        self._tokens = tokens.view(self.dtype)
        self.manifest = read_manifest(self.prefix)
        if self.manifest is not None:
            self._check_manifest(self.manifest.contents, index_size=len(index))
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)  # all of it was read once; what is needed again comes back

    def _check_manifest(self, said: Contents, *, index_size: int) -> None:
        """What the manifest says is what is there; hashes are ``data.verify``'s."""
        there = {
            "dtype": (said.dtype, self.dtype.name),
            "documents": (said.documents, len(self.document_indices) - 1),
            "sequences": (said.sequences, len(self)),
            "tokens": (said.tokens, len(self._tokens)),
            "idx.size": (said.idx.size, index_size),
        }
        wrong = [
            f"contents.{name} is {told}, the files have {found}"
            for name, (told, found) in there.items()
            if told != found
        ]
        if wrong:
            raise DataError(
                f"{manifest_path(self.prefix)}: {'; '.join(wrong)}; it is of another data set, or the files were "
                "replaced: write the data set again, or remove the manifest to go without its checks"
            )

    def _check_documents(self) -> None:
        """Boundaries start at 0, never go back, and end at the number of sequences."""
        bounds, count = self.document_indices, len(self.sequence_lengths)
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != count or np.any(bounds[1:] < bounds[:-1]):
            raise DataError(f"{self.idx_path}: the document boundaries do not run from 0 to {count} sequences")

    def _check_sequences(self) -> int:
        """Sequences lie end to end; returns the bytes they take."""
        end = 0
        for start in range(0, len(self.sequence_lengths), BLOCK):
            lengths, offsets = self.sequence_lengths[start : start + BLOCK], self.offsets[start : start + BLOCK]
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            wrong = (lengths < 0) | (offsets != np.concatenate(([end], ends[:-1])))
            if np.any(wrong):
                first = int(np.argmax(wrong))
                raise DataError(
                    f"{self.idx_path}: sequence {start + first} has length {lengths[first]} and byte offset "
                    f"{offsets[first]}, which does not follow the sequence before it; write the data set again"
                )
            end = int(ends[-1])
        return end

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Tokens ``offset`` to ``offset + length`` of a sequence (default: to its end), a read-only view.

        Raises:
            IndexError: no such sequence, or the range is not in it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix}: sequence {index}: it has {len(self)}")
        total = int(self.sequence_lengths[index])
        length = total - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > total:
            raise IndexError(f"{self.prefix}: tokens {offset} to {offset + length} of sequence {index}: it has {total}")
        start = int(self.offsets[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    @cached_property
    def index_sha256(self) -> str:
        """SHA-256 of the .idx file: where the manifest is not older than that, what it says, else computed."""
        manifest = manifest_path(self.prefix)
        if self.manifest is not None and manifest.stat().st_mtime_ns >= self.idx_path.stat().st_mtime_ns:
            return self.manifest.contents.idx.sha256
        with self.idx_path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens in one read-only array."""
        return self._tokens


class IndexedDatasetWriter:
    """Writes ``prefix.bin`` and ``prefix.idx`` under temporary names; ``close`` gives them their own.

    As a context manager it closes on success and discards on an exception, so that a name is either absent, the old
    pair or the whole new pair. The folder is made where there is none. The files are hashed on their way to the disk.

    Attributes:
        num_tokens: how many were added so far.
        origin: what the manifest will say of who made the data set; may be replaced until ``close``.

    Raises:
        DataError: the dtype is not one of the format's, a token does not fit it, or a file cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike, *, multimodal: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODE_OF_DTYPE:
            names = ", ".join(map(str, CODE_OF_DTYPE))
            raise DataError(f"{self.prefix}: dtype {self.dtype} has no place in the format; use one of {names}")
        self._lengths = array("i")
        self._modes: array[int] | None = array("b") if multimodal else None
        self._boundaries = array("q", [0])
        self.num_tokens = 0
        self.origin = Origin.unknown()
        self._largest: int | None = None
        self._temporary = {end: temporary_path(self.prefix, end) for end in ("bin", "idx")}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = HashedFile(self._temporary["bin"])
        except OSError as error:
            raise DataError(f"{self.prefix}.bin: cannot be written: {error.strerror}") from error

    def add_sequence(self, tokens: ArrayLike, *, mode: int = 0) -> None:
        """Append one sequence to the document at hand. A mode other than 0 needs ``multimodal``."""
        self._check_length(np.size(tokens))
        stored = self._checked(tokens)
        assert self._modes is not None or mode == 0, f"mode {mode} in a data set without modes"
        self._write(stored)
        self._lengths.append(len(stored))
        if self._modes is not None:
            self._modes.append(mode)

    def end_document(self) -> None:
        """End the document at hand; it may hold no sequence."""
        self._boundaries.append(len(self._lengths))

    def add_documents(self, tokens: ArrayLike, lengths: NDArray[np.int64]) -> None:
        """Append documents of one sequence each, laid end to end; one of length 0 becomes a document of none."""
        assert np.all(lengths >= 0), f"the length {lengths.min()}"
        self._check_length(int(lengths.max(initial=0)))
        stored = self._checked(tokens)
        assert len(stored) == lengths.sum(), f"{len(stored)} tokens, but the lengths sum to {lengths.sum()}"
        self._write(stored)
        present = lengths > 0
        self._boundaries.frombytes((len(self._lengths) + np.cumsum(present, dtype=np.int64)).tobytes())
        self._lengths.frombytes(lengths[present].astype(np.int32).tobytes())
        if self._modes is not None:
            self._modes.frombytes(bytes(int(present.sum())))

    def add_dataset(self, dataset: IndexedDataset, report: Callable[[int], None]) -> None:
        """Append the documents of another data set: its bytes, and its index moved behind what is there.

        ``report`` is called with the tokens copied since the last call.
        """
        assert dataset.dtype == self.dtype, f"{dataset.dtype} among {self.dtype}"
        assert (dataset.modes is None) == (self._modes is None), f"{dataset.prefix}: modes on one side only"
        self._boundaries.frombytes((dataset.document_indices[1:] + len(self._lengths)).astype(np.int64).tobytes())
        self._lengths.frombytes(dataset.sequence_lengths.astype(np.int32).tobytes())
        if self._modes is not None and dataset.modes is not None:
            self._modes.frombytes(dataset.modes.tobytes())
        for start in range(0, len(dataset.tokens), BLOCK):
            block = dataset.tokens[start : start + BLOCK]
            self._write(self._checked(block))
            report(len(block))

    def beside(self, ending: str) -> Path:
        """Where to write ``prefix.ENDING``, which gets its name or is discarded with the data set."""
        return self._temporary.setdefault(ending, temporary_path(self.prefix, ending))

    def close(self) -> Manifest:
        """Write all to the disk, then give it its names: tokens, index, what lies beside them, the manifest last.

        The old manifest and index go first, so that files of two data sets are never mixed. Returns the manifest.
        """
        ended = self._boundaries[-1] == len(self._lengths)
        if not ended:
            self.discard()
        assert ended, f"{self.prefix}: the last document was not ended, at {len(self._lengths)} sequences"
        try:
            with HashedFile(self._temporary["idx"]) as index:
                self._write_index(index)
            self._bin.close()
            manifest = Manifest(contents=self._contents(index), origin=self.origin)
            store_manifest(self.beside("manifest.json"), manifest)
            remove_manifest(self.prefix)
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            for end, path in self._temporary.items():
                self._temporary[end] = path.rename(f"{self.prefix}.{end}")
        except OSError as error:
            self.discard()
            raise DataError(f"{self.prefix}: cannot be written: {error.strerror}; nothing was published") from error
        except DataError:  # of the old manifest
            self.discard()
            raise
        self._temporary.clear()
        return manifest

    def discard(self) -> None:
        """Give up: remove what was written, also what has its name already where ``close`` stopped half-way."""
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        self._bin.abandon()

    def _contents(self, index: HashedFile) -> Contents:
        return Contents(
            documents=len(self._boundaries) - 1,
            sequences=len(self._lengths),
            tokens=self.num_tokens,
            dtype=self.dtype.name,
            largest_token=self._largest,
            bin=self._bin.facts(),
            idx=index.facts(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _check_length(self, length: int) -> None:
        if length > np.iinfo(np.int32).max:
            raise DataError(f"{self.prefix}: a sequence of {length} tokens; the format holds up to 2147483647")

    def _checked(self, tokens: ArrayLike) -> NDArray[Any]:
        """``tokens`` in the stored dtype; refused, never wrapped, where an id does not fit."""
        given = np.asarray(tokens)
        if given.ndim != 1:
            raise DataError(f"{self.prefix}: a sequence has one dimension, not the shape {given.shape}")
        if self.dtype.kind in "iu" and given.size > 0:
            limits = np.iinfo(self.dtype)
            if given.dtype.kind not in "iu":
                raise DataError(f"{self.prefix}: tokens of type {given.dtype} cannot be stored as {self.dtype}")
            low, high = int(given.min()), int(given.max())
            if low < limits.min or high > limits.max:
                bad = low if low < limits.min else high
                raise DataError(f"{self.prefix}: token {bad} does not fit {self.dtype} ({limits.min} to {limits.max})")
            self._largest = high if self._largest is None else max(self._largest, high)
        return given.astype(self.dtype, copy=False)

    def _write(self, stored: NDArray[Any]) -> None:
        try:
            self._bin.write(np.ascontiguousarray(stored).data)
            self.num_tokens += len(stored)
        except OSError as error:
            self.discard()
            raise DataError(f"{self.prefix}.bin: cannot be written: {error.strerror}; nothing was published") from error

    def _write_index(self, file: HashedFile) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        code = CODE_OF_DTYPE[self.dtype]
        file.write(MAGIC + HEADER.pack(VERSION, code, len(lengths), len(self._boundaries)))
        file.write(lengths.astype("<i4").data)
        end = 0
        for start in range(0, len(lengths), BLOCK):
            ends = end + np.cumsum(lengths[start : start + BLOCK], dtype=np.int64) * self.dtype.itemsize
            file.write(np.concatenate(([end], ends[:-1])).astype("<i8").data)
            end = int(ends[-1])
        file.write(np.frombuffer(self._boundaries, dtype=np.int64).astype("<i8").data)
        if self._modes is not None:
            file.write(self._modes.tobytes())


def _map(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file; an empty file cannot be mapped."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
