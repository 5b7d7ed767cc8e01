"""Bytes of corpus files: ranges of plain ones, unpacked gzip and zstd, in chunks that end where a line does."""

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from megatron_aquila.data.records import Broken, Kind
from megatron_aquila.errors import DataError

STDIN: Final = Path("-")
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
CHUNK_BYTES: Final = 1 << 20
PACKED_BYTES: Final = 1 << 16  # what is unpacked at once: gzip makes at most 64 MiB of it
LARGEST_WINDOW: Final = 1 << 31  # zstd --long=31


class Compression(StrEnum):
    """How a file is packed, told by the end of its name; standard input is told by its first bytes."""

    NONE = ""
    GZIP = "gzip"
    ZSTD = "zstd"


SUFFIXES: Final = {".gz": Compression.GZIP, ".zst": Compression.ZSTD, ".zstd": Compression.ZSTD}
MAGIC: Final = {Compression.GZIP: b"\x1f\x8b", Compression.ZSTD: b"\x28\xb5\x2f\xfd"}


class _Member(Protocol):
    """A gzip member or zstd frame on its way: zlib's and zstandard's own interface."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, or standard input for ``-``.

    Raises:
        DataError: it cannot be opened or read.
    """
    try:
        if path == STDIN:
            yield sys.stdin.buffer
        else:
            with path.open("rb") as raw:
                yield raw
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def unpacked(raw: BinaryIO, compression: Compression) -> Iterator[bytes]:
    """All bytes of a stream, in chunks of about a megabyte or less.

    Raises:
        Broken: the packed stream is cut off or broken; what came before it was yielded.
        DataError: the package that unpacks is not installed.
    """
    if compression is Compression.NONE:
        return iter(lambda: raw.read(CHUNK_BYTES), b"")
    return _members(raw, compression, _member_type(compression))


def _members(raw: BinaryIO, compression: Compression, new: Callable[[], _Member]) -> Iterator[bytes]:
    position, seen, member, data = 0, 0, None, b""
    while data := data or raw.read(PACKED_BYTES):
        position += len(data)
        if member is None:
            if seen > 0 and compression is Compression.GZIP and not data.strip(b"\0"):
                data = b""  # tapes and some servers fill up with zeros
                continue
            member, seen = new(), seen + 1
        try:
            chunk = member.decompress(data)
        except Exception as error:  # zlib.error and zstandard.ZstdError, which is there only with the package
            raise Broken(
                Kind.DAMAGED, f"the {compression} stream is broken before byte {position:,} of the file: {error}"
            ) from error
        if chunk:
            yield chunk
        data = member.unused_data if member.eof else b""
        position -= len(data)
        if member.eof:
            member = None
    if member is not None or seen == 0:
        raise Broken(
            Kind.DAMAGED, f"the {compression} stream is cut off: the file ends at byte {position:,}, within it"
        )


def _member_type(compression: Compression) -> Callable[[], _Member]:
    if compression is Compression.GZIP:
        return lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        import zstandard
    except ImportError as error:
        raise DataError("zstd files need the zstandard package: pip install 'megatron_aquila[data]'") from error
    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj


def without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes of a file without the byte order mark before them."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= len(BYTE_ORDER_MARK):
            break
    if head := head.removeprefix(BYTE_ORDER_MARK):
        yield head
    yield from chunks


def owned_lines(raw: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Chunks of the lines that begin within ``[start, stop)`` of a plain file; the last goes on to its own end.

    Whatever the cuts, each line belongs to one range.
    """
    position = 0
    if start > 0:
        raw.seek(start - 1)
        while (part := raw.readline(CHUNK_BYTES)) and not part.endswith(b"\n"):
            pass
        position = raw.tell()
    if position >= stop:
        return
    while chunk := raw.read(CHUNK_BYTES):
        if position + len(chunk) >= stop and (end := chunk.find(b"\n", max(stop - 1 - position, 0)) + 1) > 0:
            yield chunk[:end]
            return
        yield chunk
        position += len(chunk)


def line_blocks(chunks: Iterator[bytes], longest: int) -> Iterator[tuple[list[bytes], bool]]:
    """The lines in blocks, without their line feeds: as ``split(b"\\n")`` of all chunks at once would give them.

    What follows the last line feed, perhaps nothing, is a block of its own, and the only one with True. A line of more
    than ``longest`` bytes loses what is behind the first ``longest + 1`` if it goes on for chunks: that it is too long
    is still seen.
    """
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        lines = chunk.split(b"\n")
        if held <= longest:
            parts.append(lines[0][: longest + 1])
            held += len(parts[-1])
        if len(lines) > 1:
            lines[0] = b"".join(parts)
            parts = [lines.pop()]
            held = len(parts[0])
            yield lines, False
    yield [b"".join(parts)], True


def whole_lines(chunks: Iterator[bytes], size: int, longest: int) -> Iterator[tuple[bytes, bool]]:
    """The same bytes in blocks that end with the first line feed at or behind ``size`` bytes, whatever the chunks.

    What follows the last line feed, perhaps nothing, is a block of its own, and the only one with True. Of a line of
    more than ``longest`` bytes that goes on for chunks less is kept, but still too much.

    Raises:
        Broken: as ``chunks``; the whole lines before came in blocks.
    """
    parts: list[bytes] = []
    held, broken = 0, None
    try:
        for chunk in chunks:
            start = 0
            while (end := chunk.find(b"\n", max(start + size - held - 1, start)) + 1) > 0:
                yield b"".join([*parts, chunk[start:end]]), False
                parts, held, start = [], 0, end
            parts += [chunk[start:]] if held <= size + longest else []
            held += len(chunk) - start
    except Broken as error:
        broken = error
    lines = b"".join(parts)
    end = lines.rfind(b"\n") + 1
    if end > 0:
        yield lines[:end], False
    if broken is not None:
        raise broken
    yield lines[end:], True


class LineNumbers:
    """Which line of its file an offset of a plain file is in: counted only when asked, and each byte only once."""

    def __init__(self) -> None:
        self._path = STDIN
        self._offset, self._lines = 0, 0

    def before(self, path: Path, start: int) -> int:
        """How many lines of the file begin before byte ``start``.

        Raises:
            DataError: the file cannot be read.
        """
        if start == 0:
            return 0
        if path != self._path or start < self._offset:
            self._path, self._offset, self._lines = path, 0, 0
        with opened(path) as raw:
            raw.seek(self._offset)
            while self._offset < start - 1 and (chunk := raw.read(min(CHUNK_BYTES, start - 1 - self._offset))):
                self._lines += chunk.count(b"\n")
                self._offset += len(chunk)
        return self._lines + 1


def sniffed(raw: BinaryIO) -> Compression:
    """How a stream is packed, by its first bytes, which are not consumed."""
    head = raw.peek(4) if isinstance(raw, BufferedReader) else b""
    return next((packed for packed, magic in MAGIC.items() if head.startswith(magic)), Compression.NONE)
