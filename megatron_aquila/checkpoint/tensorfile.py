"""Safetensors files, written as a stream.

The library's own writer wants every tensor in CPU memory before it begins and leaves hashing to a second pass. Here the
header is computed from shapes, each tensor is fetched when its turn comes and copied from its device in small pieces,
and the hash is taken on the way: the extra memory is one tensor at most. Files are read with the library.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be: ``load`` is called once, when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fetch(self) -> Tensor:
        """Its elements, flat and contiguous, on whichever device they are."""
        tensor = self.load()
        found, announced = (tensor.dtype, tuple(tensor.shape)), (self.dtype, self.shape)
        assert found == announced, f"{self.key}: loaded {found}, announced {announced}"
        return tensor.detach().reshape(-1)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a finished file must look like: its size in bytes and the SHA-256 of all of it, in hex."""

    size: int
    sha256: str


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write ``entries`` to the safetensors file ``path`` and flush it to the disk. Raises OSError."""
    header, ordered = header_and_order(entries, metadata)
    return write_stream(path, chain([memoryview(header)], *map(_pieces, ordered)))


def write_stream(path: Path, parts: Iterable[memoryview]) -> FileRecord:
    """Write ``parts`` one after the other and flush them to the disk, hashed on the way. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in parts:
            digest.update(data)
            file.write(data)
            del data  # it holds its tensor's memory, which must be free before the next tensor is loaded
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileRecord(size, digest.hexdigest())


def header_and_order(
    entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, Sequence[Entry]]:
    """The beginning of the file, and the order in which the tensors' bytes follow it."""
    assert sys.byteorder == "little", "safetensors are little-endian and so must this machine be"
    # Widest types first: every tensor then begins at a multiple of its item size, which readers through mmap need.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    return _header(ordered, metadata), ordered


def _pieces(entry: Entry) -> Iterator[memoryview]:
    """The bytes of one tensor, fetched when the first piece is asked for and dropped after the last."""
    flat = entry.fetch()
    for start in range(0, len(flat), step := _PIECE_BYTES // entry.dtype.itemsize):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON table of the file's beginning, padded with spaces to a multiple of 8."""
    table: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    stop = 0
    for entry in entries:
        assert entry.key not in table, f"two tensors are called {entry.key}"
        start, stop = stop, stop + entry.num_bytes
        table[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, stop),
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
