"""Objects of JSON lines and of JSON arrays, and what exactly is wrong with what is none."""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from megatron_aquila.data.records import (
    BadValue,
    Kind,
    Parsed,
    ReadOptions,
    Records,
    Refused,
    check_surrogates,
    meta_of,
    texts_of,
    too_long,
)
from megatron_aquila.data.streams import BYTE_ORDER_MARK

try:
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = None  # type: ignore[assignment]

UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
BLANK: Final = re.compile(r"[ \t\r\n]*")
OPEN_END: Final = re.compile(r"[\w\\.+-]{0,12}\s*\Z")  # the end of the text, perhaps within a literal or an escape
FIRST_TRY: Final = 1 << 16  # characters of an array that must be there before an element is looked for


def line_parser(options: ReadOptions) -> Callable[[bytes], tuple[tuple[str, ...], Any]]:
    """The function from a line to its texts and its fields to keep; it raises BadValue.

    orjson, where it is installed, is only the fast way: a line that it refuses is judged by Python's ``json``, which
    takes ``NaN`` and ``Infinity`` as its ``dump`` writes them.
    """
    texts, keep, fields = texts_of(options), options.keep_meta, options.fields
    tokens = [json.dumps(key, ensure_ascii=False).encode() for key in dict.fromkeys(fields)]

    def parse(line: bytes) -> tuple[tuple[str, ...], Any]:
        if len(line) > options.max_document_bytes:
            raise too_long(options.max_document_bytes)
        try:
            record = fast(line)
            found = texts(record)
        except ValueError:
            record = _loads(line)
            found = texts(record)
            check_surrogates(found, fields)
        for token in tokens:  # a quote inside a string is escaped, so that this is a key, or a whole string
            if line.count(token) > 1:
                _refuse_twice(line, fields)
        return found, meta_of(record, keep) if keep else None

    fast = _not_fast if _fast_loads is None else _fast_loads
    return parse


def _not_fast(line: bytes) -> Any:
    raise ValueError("orjson is not installed")


def _loads(line: bytes) -> Any:
    if line.startswith(BYTE_ORDER_MARK):
        raise BadValue(Kind.BYTE_ORDER_MARK, "a byte order mark within the file: were files joined that had one each?")
    try:
        return json.loads(utf8(line))
    except (ValueError, RecursionError) as error:
        raise BadValue(Kind.NOT_JSON, f"not JSON: {error}") from error


def utf8(data: bytes, whole: str = "line") -> str:
    """Decoded; BadValue names the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16, which iconv makes UTF-8 of" if data.startswith(UTF16_MARKS) else ""
        why = f"not UTF-8: byte {error.start + 1} of the {whole} is 0x{data[error.start]:02x}{hint}"
        raise BadValue(Kind.NOT_UTF8, why) from error


def _refuse_twice(line: bytes, fields: Sequence[str]) -> None:
    """BadValue where the line's object has one of the fields twice: one of the texts would be lost."""
    pairs: list[tuple[str, Any]] = []

    def last(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object is finished last
        return dict(found)

    json.loads(line.decode("utf-8"), object_pairs_hook=last)
    names = [name for name, _ in pairs]
    for key in fields:
        if names.count(key) > 1:
            raise BadValue(Kind.DUPLICATE_KEY, f"the key {key!r} is there {names.count(key)} times")


def json_lines(blocks: Iterator[bytes], options: ReadOptions) -> Records:
    """A record for each line that is not blank; numbers from 1."""
    parse = line_parser(options)
    number = 0
    for block in blocks:
        lines = block.split(b"\n")
        cut = lines.pop()  # what follows the last line feed: nothing, or the end of the file
        for line in lines:
            number += 1
            try:
                texts, meta = parse(line)
            except BadValue as error:
                if line.strip():
                    yield Refused(number, error)
                continue
            yield Parsed(texts, meta, number, len(line) + 1)
        if cut.strip():
            number += 1
            try:
                yield Parsed(*parse(cut), number, len(cut))
            except BadValue as error:
                yield Refused(number, _at_the_end(error))


def _at_the_end(error: BadValue) -> BadValue:
    if error.kind not in (Kind.NOT_JSON, Kind.NOT_UTF8):
        return error
    return BadValue(Kind.CUT_OFF, f"{error.why}; the file ends within this line: was it cut off?")


class _Buffer:
    """The part of an array that is at hand, as text; bytes that are not UTF-8 stand as U+DC80 to U+DCFF."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.at, self.ended = "", 0, False

    def more(self, wanted: int) -> None:
        """Read on until ``wanted`` characters are left, or the file ends; what is behind is dropped."""
        parts, held = [self.text[self.at :]], len(self.text) - self.at
        while held < wanted and not self.ended:
            chunk = next(self._chunks, b"")
            self.ended = not chunk
            parts.append(self._decode(chunk, self.ended))
            held += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def skip_blank(self) -> str:
        """The next character that is not blank, which stays; empty at the end of the file."""
        while True:
            match = BLANK.match(self.text, self.at)
            assert match is not None, "the pattern matches nothing, too"
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more(1)


def json_array(chunks: Iterator[bytes], options: ReadOptions) -> Records:
    """A record for each element of the array that a file is, numbers from 1; holds one element at a time.

    Where the array is broken its end cannot be told, and reading stops: the record then ``ends_piece``.
    """
    texts, fields = texts_of(options), options.fields
    buffer = _Buffer(chunks)
    number = 0
    try:
        if buffer.skip_blank() != "[":
            raise BadValue(Kind.NOT_JSON, f"expected [ and the elements of an array, got {_excerpt(buffer)}")
        buffer.at += 1
        more = buffer.skip_blank() != "]"
        buffer.at += not more
        while more:
            number += 1
            record, source = _element(buffer, options.max_document_bytes)
            try:
                found = texts(record)
                _refuse_undecoded(source, number)
                check_surrogates(found, fields)
                _refuse_repeated(source, fields)
                size = len(source) if source.isascii() else len(source.encode("utf-8", "surrogatepass"))
                yield Parsed(found, meta_of(record, options.keep_meta), number, size)
            except BadValue as error:
                yield Refused(number, error)
            more = _comma(buffer)
        number += 1
        if buffer.skip_blank():
            raise BadValue(Kind.NOT_JSON, f"the array has ended, but {_excerpt(buffer)} follows")
    except BadValue as error:
        yield Refused(max(number, 1), BadValue(error.kind, error.why, ends_piece=True))


def _excerpt(buffer: _Buffer) -> str:
    found = buffer.text[buffer.at : buffer.at + 20]
    return ascii(found) if found else "the end of the file"


def _element(buffer: _Buffer, limit: int) -> tuple[Any, str]:
    """The next element and its source. An error at the end of what is at hand may only mean that more must be read."""
    wanted = FIRST_TRY
    if len(buffer.text) - buffer.at < wanted:
        buffer.more(wanted)
    while True:
        try:
            record, end = _DECODER.raw_decode(buffer.text, buffer.at)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Unterminated string") and OPEN_END.match(buffer.text, error.pos) is None:
                raise BadValue(
                    Kind.NOT_JSON, f"not JSON: {error.msg}, {error.pos - buffer.at} characters on"
                ) from error
        except (ValueError, RecursionError) as error:
            raise BadValue(Kind.NOT_JSON, f"not JSON: {error}") from error
        else:
            if end < len(buffer.text) or buffer.ended:
                source = buffer.text[buffer.at : end]
                buffer.at = end
                return record, source
        held = len(buffer.text) - buffer.at
        if buffer.ended:
            raise BadValue(Kind.CUT_OFF, "the file ends within this element: was it cut off?")
        if held > limit:
            raise too_long(limit)
        buffer.more(2 * max(held, wanted))


def _comma(buffer: _Buffer) -> bool:
    """Whether an element follows."""
    found = buffer.skip_blank()
    if found == "":
        raise BadValue(Kind.CUT_OFF, "the file ends behind this element, without ]: was it cut off?")
    if found not in ",]":
        raise BadValue(Kind.NOT_JSON, f"expected , or ] behind this element, got {_excerpt(buffer)}")
    buffer.at += 1
    if found == ",":
        buffer.skip_blank()
    return found == ","


_DECODER: Final = json.JSONDecoder()
ESCAPED_BYTES: Final = re.compile("[\udc80-\udcff]")


def _refuse_undecoded(source: str, number: int) -> None:
    if not source.isascii() and (match := ESCAPED_BYTES.search(source)) is not None:
        byte = ord(match[0]) - 0xDC00
        why = f"not UTF-8: character {match.start() + 1} of element {number} is the byte 0x{byte:02x}"
        raise BadValue(Kind.NOT_UTF8, why)


def _refuse_repeated(source: str, fields: Sequence[str]) -> None:
    for key in fields:
        if source.count(json.dumps(key, ensure_ascii=False)) > 1:
            _refuse_twice(source.encode("utf-8"), fields)
