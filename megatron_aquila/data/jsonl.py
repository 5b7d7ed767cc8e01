"""Documents of JSON-lines files, with the file and line of everything that is wrong."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_aquila.errors import DataError

BLOCK_BYTES: Final = 1 << 20  # about half a second of tokenizing
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Consecutive raw lines of a file: the number of the first, and how many bytes of the file were read after them."""

    path: Path
    first: int
    lines: list[bytes]
    position: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no document, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Documents:
    """What a block holds: for each good line its texts in the order of the keys, and the bad lines."""

    texts: list[tuple[str, ...]]
    bad: list[BadLine]


def read_blocks(path: Path) -> Iterator[LineBlock]:
    """The lines of a file in blocks of about a megabyte; a name that ends in ``.gz`` is unpacked on the way.

    Raises:
        DataError: the file cannot be read, or its compression is damaged.
    """
    try:
        with path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            first = 1
            while lines := stream.readlines(BLOCK_BYTES):
                yield LineBlock(path, first, lines, raw.tell())
                first += len(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_block(block: LineBlock, keys: Sequence[str]) -> Documents:
    """Each line's texts under ``keys``, or why it has none."""
    found = Documents([], [])
    for number, raw in enumerate(block.lines, start=block.first):
        try:
            found.texts.append(_texts(raw, keys))
        except ValueError as error:
            found.bad.append(BadLine(block.path, number, str(error)))
    return found


def read_texts(path: Path, key: str) -> Iterator[str]:
    """One text a line.

    Raises:
        DataError: at the first bad line.
    """
    for block in read_blocks(path):
        documents = parse_block(block, [key])
        if documents.bad:
            raise DataError(str(documents.bad[0]))
        yield from (text for (text,) in documents.texts)


def _texts(raw: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    if raw.startswith(BYTE_ORDER_MARK):
        raise ValueError("starts with a byte order mark; save the file as UTF-8 without one")
    if not raw.strip():
        raise ValueError("the line is blank")
    try:
        line = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}") from error
    except (ValueError, RecursionError) as error:
        cut = "" if raw.endswith(b"\n") else "; the file ends within this line: was it cut off?"
        raise ValueError(f"not JSON: {error}{cut}") from error
    return tuple(_text(line, key) for key in keys)


def _text(line: object, key: str) -> str:
    if not isinstance(line, dict):
        raise ValueError(f"expected an object with the key {key!r}, got a {type(line).__name__}")
    if key not in line:
        raise ValueError(f"no key {key!r}; it has {', '.join(map(repr, line)) or 'none'}; choose with --json-keys")
    text = line[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a string but a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = text[error.start].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{key!r} has half a surrogate pair, {found}, at character {error.start + 1}") from error
    return text
