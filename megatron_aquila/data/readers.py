"""The documents of a piece of a corpus: one reader a format, every one streaming, no byte lost without a word."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

from megatron_aquila.data.inputs import BY_LINES, Format, InputFormat, Piece, plan_pieces
from megatron_aquila.data.json_records import json_array, json_lines, utf8
from megatron_aquila.data.parquet import parquet_rows
from megatron_aquila.data.records import (
    BadRecord,
    BadValue,
    Document,
    Kind,
    Parsed,
    ReadOptions,
    Records,
    Refused,
    meta_of,
    texts_of,
    too_long,
)
from megatron_aquila.data.streams import (
    STDIN,
    Compression,
    Damaged,
    LineNumbers,
    opened,
    owned_lines,
    sniffed,
    unpacked,
    whole_lines,
    without_mark,
)
from megatron_aquila.errors import DataError


def read_piece(piece: Piece, options: ReadOptions, lines: LineNumbers | None = None) -> Iterator[Document | BadRecord]:
    """The piece's records in their order, in bounded memory: a block of about a megabyte, or one long record.

    Blank lines are no records. A worker that reads several pieces keeps one ``lines`` for all of them, so that a file
    of many bad lines is counted through once.

    Raises:
        DataError: the file cannot be opened or read, or the package that reads it is not installed. A file that is
            damaged within gives a BadRecord that ``ends_piece``.
    """
    path, number = piece.path, 0
    try:
        for record in _records(piece, options):
            if isinstance(record, Parsed):
                texts, meta, number, num_bytes = record
                yield Document(texts, path, number, meta, num_bytes)
            else:
                number, bad = record
                yield BadRecord(path, line_of(piece, number, lines), bad.kind, bad.why, bad.ends_piece)
    except Damaged as error:
        why = f"{error}; all behind this is lost"
        yield BadRecord(path, line_of(piece, number + 1, lines), Kind.DAMAGED, why, ends_piece=True)


def line_of(piece: Piece, line: int, lines: LineNumbers | None = None) -> int:
    """The line in the file of a line of the piece; a piece from the middle of a file may have to count before it.

    Raises:
        DataError: the file cannot be read for that.
    """
    before = piece.lines_before
    if before is None:
        before = (lines or LineNumbers()).before(piece.path, piece.start)
    return before + line


def read_texts(path: Path, key: str, input_format: InputFormat = "auto") -> Iterator[str]:
    """One text a record, of a file of any format.

    Raises:
        DataError: the file cannot be read, or at the first bad record.
    """
    for piece in plan_pieces([str(path)], input_format=input_format):
        for record in read_piece(piece, ReadOptions(keys=(key,))):
            if isinstance(record, BadRecord):
                raise DataError(str(record))
            yield record.texts[0]


def _records(piece: Piece, options: ReadOptions) -> Records:
    if piece.format is Format.PARQUET:
        yield from parquet_rows(piece.path, piece.start, options)
        return
    with opened(piece.path) as raw:
        yield from READERS[piece.format](_chunks(raw, piece), options)


def _chunks(raw: BinaryIO, piece: Piece) -> Iterator[bytes]:
    if piece.path == STDIN:
        return without_mark(unpacked(raw, sniffed(raw)))
    if piece.compression is Compression.NONE and piece.format in BY_LINES and piece.stop > 0:
        chunks = owned_lines(raw, piece.start, piece.stop)
        return chunks if piece.start > 0 else without_mark(chunks)
    return without_mark(unpacked(raw, piece.compression))


def _json_lines(chunks: Iterator[bytes], options: ReadOptions) -> Records:
    return json_lines(whole_lines(chunks, options.max_document_bytes), options)


def _lines(chunks: Iterator[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their line feed, blank ones too."""
    number = 0
    for block in whole_lines(chunks, longest):
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield from enumerate(lines, number + 1)
        number += len(lines)


def _text_lines(chunks: Iterator[bytes], options: ReadOptions) -> Records:
    for number, line in _lines(chunks, options.max_document_bytes):
        if line.strip():
            yield _text(line.removesuffix(b"\r"), number, options, "line")


def _text_paragraphs(chunks: Iterator[bytes], options: ReadOptions) -> Records:
    parts: list[bytes] = []
    first, held = 0, 0
    for number, line in chain(_lines(chunks, options.max_document_bytes), [(0, b"")]):
        if line.strip():
            first = number if held == 0 else first
            if held <= options.max_document_bytes + 1:  # else what is held is seen to be too long
                parts.append(line)
            held += len(line) + 1
        elif held > 0:
            yield _text(b"\n".join(parts).removesuffix(b"\r"), first, options, "paragraph")
            parts, held = [], 0


def _text_file(chunks: Iterator[bytes], options: ReadOptions) -> Records:
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        if held <= options.max_document_bytes:
            parts.append(chunk)
            held += len(chunk)
    yield _text(b"".join(parts), 1, options, "file")


def _text(data: bytes, number: int, options: ReadOptions, whole: str) -> Parsed | Refused:
    """Plain text is a record with one field, ``text``."""
    try:
        if len(data) > options.max_document_bytes:
            raise too_long(options.max_document_bytes)
        record = {"text": utf8(data, whole)}
        return Parsed(texts_of(options)(record), meta_of(record, options.keep_meta), number, len(data))
    except BadValue as error:
        return Refused(number, error)


READERS: Final[dict[Format, Callable[[Iterator[bytes], ReadOptions], Records]]] = {
    Format.JSON_LINES: _json_lines,
    Format.JSON_ARRAY: json_array,
    Format.TEXT_FILE: _text_file,
    Format.TEXT_LINE: _text_lines,
    Format.TEXT_PARAGRAPH: _text_paragraphs,
}
