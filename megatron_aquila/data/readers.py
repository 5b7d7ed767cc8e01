"""The documents of a piece of a corpus: one reader a format, every one streaming, no byte lost without a word."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from megatron_aquila.data import splitters
from megatron_aquila.data.inputs import BY_LINES, Format, InputFormat, Piece, plan_pieces
from megatron_aquila.data.json_records import element_parser, json_parser, utf8
from megatron_aquila.data.parquet import parquet_rows, row_parser
from megatron_aquila.data.records import (
    BadRecord,
    BadValue,
    Broken,
    Document,
    Found,
    Join,
    Joined,
    Kind,
    Parse,
    ReadOptions,
    meta_of,
    texts_of,
    too_long,
)
from megatron_aquila.data.splitters import Split
from megatron_aquila.data.streams import (
    STDIN,
    Compression,
    LineNumbers,
    opened,
    owned_lines,
    sniffed,
    unpacked,
    whole_lines,
    without_mark,
)
from megatron_aquila.errors import DataError

BLOCK_BYTES: Final = 1 << 20  # of lines that are joined at once
MOST_ALONE: Final = 8  # lines of a block that are read alone, before all of its others are


def read_piece(piece: Piece, options: ReadOptions, lines: LineNumbers | None = None) -> Iterator[Document | BadRecord]:
    """The piece's records in their order, in bounded memory: a block of about a megabyte, or one long record.

    Blank lines are no records. A worker that reads several pieces keeps one ``lines`` for all of them, so that a file
    of many bad lines is counted through once.

    Raises:
        DataError: the file cannot be opened or read, or the package that reads it is not installed. A file that is
            damaged within gives a BadRecord that ``ends_piece``.
    """
    if piece.files:
        for file in piece.files:
            yield from read_piece(file, options, lines)
        return
    path, number = piece.path, 0
    split, parser = READERS[piece.format]
    parse = parser(options)
    try:
        for number, data, num_bytes, unended in split(piece, options):
            try:
                texts, meta = parse(data)
            except BadValue as error:
                yield _bad(piece, number, error, unended, lines)
            else:
                yield Document(texts, path, number, meta, num_bytes)
    except Broken as error:
        yield _broken(piece, number, error, lines)


def read_joined(
    piece: Piece, options: ReadOptions, join: Join, lines: LineNumbers | None = None
) -> Iterator[Joined | Document | BadRecord]:
    """``read_piece`` of JSON lines with their texts joined, but for lines that ``join`` leaves to be read as ever.

    Each of these ends what is joined, and what is tokenized at once: of a block with many of them none is joined.

    Raises:
        DataError: as ``read_piece``.
    """
    if piece.files:
        for file in piece.files:
            yield from read_joined(file, options, join, lines)
        return
    assert piece.format is Format.JSON_LINES, f"{piece.path} is {piece.format}"
    parse, number = json_parser(options), 0
    try:
        with _chunks(piece) as chunks:
            for block, unended in whole_lines(chunks, BLOCK_BYTES, options.max_document_bytes):
                start = alone = 0
                while start < len(block):
                    if alone < MOST_ALONE:
                        joined, num_bytes, num_lines = join(block, start)
                        if joined.documents > 0:
                            yield joined
                        start, number = start + num_bytes, number + num_lines
                        if num_lines > 0:
                            continue
                    alone += 1
                    end = len(block) if unended else block.index(b"\n", start)
                    line, start, number = block[start:end], end + 1, number + 1
                    if line and not line.isspace():
                        try:
                            texts, meta = parse(line.removesuffix(b"\r"))
                        except BadValue as error:
                            yield _bad(piece, number, error, unended, lines)
                        else:
                            yield Document(texts, piece.path, number, meta, len(line) + (not unended))
    except Broken as error:
        yield _broken(piece, number, error, lines)


def _bad(piece: Piece, number: int, error: BadValue, unended: bool, lines: LineNumbers | None) -> BadRecord:
    kind, why = _at_the_end(error) if unended else (error.kind, error.why)
    return BadRecord(piece.path, line_of(piece, number, lines), kind, why)


def _broken(piece: Piece, number: int, error: Broken, lines: LineNumbers | None) -> BadRecord:
    why = f"{error}; all behind this is lost"
    return BadRecord(piece.path, line_of(piece, number + 1, lines), error.kind, why, ends_piece=True)


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


def _at_the_end(error: BadValue) -> tuple[Kind, str]:
    if error.kind not in (Kind.NOT_JSON, Kind.NOT_UTF8):
        return error.kind, error.why
    return Kind.CUT_OFF, f"{error.why}; the file ends within this line: was it cut off?"


def _text_parser(options: ReadOptions) -> Parse:
    """Plain text is a record with one field, ``text``."""
    texts = texts_of(options)

    def parse(data: bytes) -> Found:
        if len(data) > options.max_document_bytes:
            raise BadValue(Kind.TOO_LONG, too_long(options.max_document_bytes))
        record = {"text": utf8(data)}
        return texts(record), meta_of(record, options.keep_meta)

    return parse


def _bytes_split_by(split: Callable[[Iterator[bytes], int], Split]) -> Callable[[Piece, ReadOptions], Split]:
    def records(piece: Piece, options: ReadOptions) -> Split:
        with _chunks(piece) as chunks:
            yield from split(chunks, options.max_document_bytes)

    return records


@contextmanager
def _chunks(piece: Piece) -> Iterator[Iterator[bytes]]:
    if piece.unpacked is not None:
        yield piece.unpacked.chunks()
        return
    with opened(piece.path) as raw:
        yield file_chunks(raw, piece)


def file_chunks(raw: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """The piece's bytes of its file, unpacked and without the mark that a file may begin with.

    Raises:
        Broken: the packed stream is cut off or broken; what came before it was yielded.
        DataError: the package that unpacks is not installed.
    """
    if piece.path == STDIN:
        return without_mark(unpacked(raw, sniffed(raw)))
    if piece.compression is Compression.NONE and piece.format in BY_LINES and piece.stop > 0:
        chunks = owned_lines(raw, piece.start, piece.stop)
        return chunks if piece.start > 0 else without_mark(chunks)
    return without_mark(unpacked(raw, piece.compression))


Reader = tuple[Callable[[Piece, ReadOptions], Split], Callable[[ReadOptions], Parse]]

# How each format is cut into records, and what is made of a record.
READERS: Final[dict[Format, Reader]] = {
    Format.JSON_LINES: (_bytes_split_by(splitters.lines), json_parser),
    Format.JSON_ARRAY: (_bytes_split_by(splitters.array_elements), element_parser),
    Format.PARQUET: (lambda piece, options: parquet_rows(piece.path, piece.start, options), row_parser),
    Format.TEXT_FILE: (_bytes_split_by(splitters.whole), _text_parser),
    Format.TEXT_LINE: (_bytes_split_by(splitters.lines), _text_parser),
    Format.TEXT_PARAGRAPH: (_bytes_split_by(splitters.paragraphs), _text_parser),
}
