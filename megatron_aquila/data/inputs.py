"""What there is to read: files, globs, folders and standard input as pieces that workers read alone."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from megatron_aquila.data.parquet import row_groups
from megatron_aquila.data.records import Broken, Kind
from megatron_aquila.data.streams import (
    CHUNK_BYTES,
    MAGIC,
    STDIN,
    SUFFIXES,
    Compression,
    opened,
    unpacked,
    without_mark,
)
from megatron_aquila.errors import ConfigError, DataError, Problem

PIECE_BYTES: Final = 32 << 20
InputFormat = Literal["auto", "jsonl", "json-array", "parquet", "text"]
TextDocuments = Literal["file", "line", "blank-line"]


class Format(StrEnum):
    """What a file holds; of text, what a document is."""

    JSON_LINES = "jsonl"
    JSON_ARRAY = "json-array"
    PARQUET = "parquet"
    TEXT_FILE = "text-file"
    TEXT_LINE = "text-line"
    TEXT_PARAGRAPH = "text-blank-line"


ENDINGS: Final = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
BY_LINES: Final = (Format.JSON_LINES, Format.TEXT_LINE)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Whole lines that another process has read, or why nothing more of their file can be read."""

    data: bytes = b""
    fault: tuple[Kind, str] | None = None

    def chunks(self) -> Iterator[bytes]:
        """The bytes, of about a megabyte at once.

        Raises:
            Broken: the fault.
        """
        for start in range(0, len(self.data), CHUNK_BYTES):
            yield self.data[start : start + CHUNK_BYTES]
        if self.fault is not None:
            raise Broken(*self.fault)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one worker reads alone.

    ``start`` and ``stop`` are bytes of a plain file of lines, whose lines that begin there are the piece's; the row
    group of a parquet file and the one behind it; else the whole file. ``num_bytes`` is its share of the file on disk,
    0 for standard input. ``lines_before`` is how many records of the file lie before it, None where nobody counted.
    ``unpacked`` is the piece itself, where it is but a ``block`` of what ``data.blocks`` cuts for many. ``files`` are
    pieces themselves, whole small files that are read one after the other; ``path`` is then the first one's.
    """

    path: Path
    index: int
    format: Format
    compression: Compression
    start: int
    stop: int
    num_bytes: int
    lines_before: int | None
    block: int = 0
    unpacked: Unpacked | None = None
    files: tuple["Piece", ...] = ()

    @property
    def paths(self) -> list[Path]:
        """Of all files that it lies in."""
        return [piece.path for piece in self.files] or [self.path]


def num_bytes(pieces: Iterable[Piece]) -> int:
    """Of all pieces together, as on disk."""
    return sum(piece.num_bytes for piece in pieces)


def plan_pieces(
    inputs: Sequence[str],
    *,
    piece_bytes: int = PIECE_BYTES,
    together_bytes: int | None = None,
    input_format: InputFormat = "auto",
    text_documents: TextDocuments = "file",
    leave_out: Callable[[Path], bool] = lambda _: False,
) -> list[Piece]:
    """Every input as pieces, in the order of the inputs, of the sorted names in them, and of the file.

    An input is a file, a glob (``**`` goes down), a folder (all files below it; names that begin with ``.`` or ``_``
    are left out, as Hadoop's markers are) or ``-``, standard input, which is JSON lines unless said otherwise. The
    pieces depend on the inputs and their sizes, not on who reads them. Small files share one, of up to
    ``together_bytes``; None: as many as ``piece_bytes``. Of a folder or a glob, ``leave_out`` says which files and
    folders are not meant, as those that the reader writes there.

    Raises:
        ConfigError: two inputs, or two names in them, are one file.
        DataError: an input cannot be read, matches nothing, or what it holds cannot be told from its name.
    """
    assert piece_bytes > 0, f"pieces of {piece_bytes} bytes"
    pieces: list[Piece] = []
    read: dict[Path, str] = {}
    for named in inputs:
        paths = list(_files(named, leave_out))
        _refuse_twice(named, paths, read)
        if not paths:
            raise DataError(f"{named}: no file is there; names that begin with . or _ are left out unless named")
        formats = {path: _format(path, input_format, text_documents) for path in paths}
        if len(paths) > 1 and len({_is_text(found) for found in formats.values()}) > 1:
            text = next(path for path, found in formats.items() if _is_text(found))
            raise DataError(
                f"{named}: holds records and plain text, {text}, too; choose by a glob as '{named}/*.jsonl'"
            )
        for path, found in formats.items():
            pieces += _pieces(path, found, len(pieces), piece_bytes)
    return _gathered(pieces, piece_bytes if together_bytes is None else together_bytes)


def _gathered(pieces: Sequence[Piece], most: int) -> list[Piece]:
    """Neighbours of one format that are whole files together, as long as they have no more than ``most`` bytes."""
    groups: list[list[Piece]] = []
    before, size = None, 0
    for piece in pieces:
        kind = _format_of_whole(piece)
        size += piece.num_bytes
        if kind is None or kind is not before or size > most:
            groups.append([])
            size = piece.num_bytes
        groups[-1].append(piece)
        before = kind
    return [_together(index, files) for index, files in enumerate(groups)]


def _format_of_whole(piece: Piece) -> Format | None:
    """The format of a piece that is a file from its start, and may be read again; None of another."""
    is_file = piece.path != STDIN and piece.path.is_file()
    return piece.format if is_file and piece.format is not Format.PARQUET and piece.lines_before == 0 else None


def _together(index: int, files: Sequence[Piece]) -> Piece:
    first = replace(files[0], index=index)
    return first if len(files) == 1 else replace(first, num_bytes=num_bytes(files), files=tuple(files))


def _refuse_twice(named: str, paths: Sequence[Path], read: dict[Path, str]) -> None:
    """Add the files of an input to those that are ``read``, by the input that names them; none is there twice."""
    folders = {folder: folder.resolve() for folder in {path.parent for path in paths}}  # once: there may be many files
    for path in paths:
        found = path.resolve() if path.is_symlink() else folders[path.parent] / path.name
        if found in read:
            why = f"the same file is read for --input {read[found]}, and its documents would be there twice"
            raise ConfigError([Problem("--input", path, why, "name it once, or choose by globs that share no file")])
        read[found] = named


def _files(named: str, leave_out: Callable[[Path], bool]) -> Iterator[Path]:
    path = Path(named)
    if path.is_dir():
        yield from _below(path, leave_out)
    elif path == STDIN or path.exists():  # a pipe, too, as the shell's <(...) makes
        yield path
    elif glob.has_magic(named):
        found = map(Path, sorted(glob.glob(named, recursive=True)))
        marked = path.name.startswith("_")
        meant = (match for match in found if marked or not match.name.startswith("_"))
        yield from (match for match in meant if match.is_file() and not leave_out(match))
    else:
        with opened(path):  # says why it is not there
            pass


def _below(folder: Path, leave_out: Callable[[Path], bool]) -> Iterator[Path]:
    """All files under a folder, through links, too; those that lie in it come before those of its folders."""
    try:
        found = (entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")))
        entries = sorted(entry for entry in found if not leave_out(entry))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    yield from (entry for entry in entries if not entry.is_dir())
    for entry in entries:
        if entry.is_dir():
            if entry.is_symlink() and entry.resolve() in [folder.resolve(), *folder.resolve().parents]:
                raise DataError(f"{entry}: leads back to {entry.resolve()}, which it lies in; remove the link")
            yield from _below(entry, leave_out)


def compression_of(path: Path) -> Compression:
    """How a file is packed, by the end of its name."""
    return SUFFIXES.get(path.suffix.lower(), Compression.NONE)


def _format(path: Path, asked: InputFormat, text_documents: TextDocuments) -> Format:
    plain_name = path.with_suffix("") if compression_of(path) is not Compression.NONE else path
    found: str = asked
    if asked == "auto":
        found = "jsonl" if path == STDIN else ENDINGS.get(plain_name.suffix.lower(), "")
    if found == "json":
        found = "json-array" if path.is_file() and _first_byte(path) == b"[" else "jsonl"
    if found == "":
        known = " ".join(ENDINGS)
        raise DataError(
            f"{path}: its name does not say what it holds ({known}); say --input-format, or choose by a glob"
        )
    return Format(f"text-{text_documents}" if found == "text" else found)


def _first_byte(path: Path) -> bytes:
    """The first byte that is not blank; whatever is wrong with the file is told by who reads it."""
    with opened(path) as raw:
        try:
            for chunk in without_mark(unpacked(raw, compression_of(path))):
                if stripped := chunk.lstrip():
                    return stripped[:1]
        except Broken:
            pass
    return b""


def _is_text(found: Format) -> bool:
    return found in (Format.TEXT_FILE, Format.TEXT_LINE, Format.TEXT_PARAGRAPH)


def _pieces(path: Path, found: Format, first: int, piece_bytes: int) -> Iterator[Piece]:
    compression = compression_of(path)
    if found is Format.PARQUET:
        rows = 0
        for group, (num_rows, num_bytes) in enumerate(row_groups(path)):
            yield Piece(path, first + group, found, Compression.NONE, group, group + 1, num_bytes, rows)
            rows += num_rows
        return
    size = path.stat().st_size if path.is_file() else 0
    if compression is Compression.NONE and found in BY_LINES and size > piece_bytes:
        _refuse_packed(path)
        for number, start in enumerate(range(0, size, piece_bytes)):
            stop = min(start + piece_bytes, size)
            before = None if start > 0 else 0
            yield Piece(path, first + number, found, compression, start, stop, stop - start, before)
        return
    yield Piece(path, first, found, compression, 0, size, size, 0)


def _refuse_packed(path: Path) -> None:
    with opened(path) as raw:
        head = raw.read(4)
    for packed, magic in MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path}: holds {packed}, but its name does not end so; rename it")
