"""Where records begin and end in a stream of bytes: lines, paragraphs, the elements of a JSON array, a whole file."""

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Final

from megatron_aquila.data.fast_json import fast_loads
from megatron_aquila.data.records import Broken, Kind, Raw, too_long
from megatron_aquila.data.streams import line_blocks

BLANK: Final = re.compile(rb"[ \t\r\n]*")
SCALAR: Final = re.compile(rb"[^][{},:\" \t\r\n]*+")
# A string, with a group where the bytes at hand end within it; an opening bracket; a closing one.
TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|(\\?\Z))|([{[])|([\]}])', re.DOTALL)
PERHAPS_END: Final = re.compile(rb"\}[ \t\r\n]*+[,\]]")
TRIES: Final = 8  # a text can hold any number of them
IN_STRING, OPENING, CLOSING = 1, 2, 3

Split = Iterator[Raw]


def lines(chunks: Iterator[bytes], longest: int) -> Split:
    """Lines without their ``\\n`` or ``\\r\\n``; blank ones are counted and left out."""
    first = 1
    for block, unended in line_blocks(chunks, longest):
        for number, line in enumerate(block, first):
            if line and not line.isspace():
                yield number, line.removesuffix(b"\r"), len(line) + (not unended), unended
        first += len(block)


def paragraphs(chunks: Iterator[bytes], longest: int) -> Split:
    """Lines up to a blank one, as they are but for the last line's end."""
    parts: list[bytes] = []
    first, held = 0, 0
    found = chain.from_iterable(block for block, _ in line_blocks(chunks, longest))
    for number, line in enumerate(chain(found, [b""]), 1):
        if line and not line.isspace():
            first = number if held == 0 else first
            if held <= longest + 1:  # else what is held is seen to be too long
                parts.append(line)
            held += len(line) + 1
        elif held > 0:
            yield first, b"\n".join(parts).removesuffix(b"\r"), held, False
            parts, held = [], 0


def whole(chunks: Iterator[bytes], longest: int) -> Split:
    """All of the file, at most one byte more than ``longest``."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        if held <= longest:
            parts.append(chunk)
            held += len(chunk)
    yield 1, b"".join(parts)[: longest + 1], held, False


def array_elements(chunks: Iterator[bytes], longest: int) -> Split:
    """Elements of the array that a file is, by brackets and strings alone: one that is wrong inside has an end, too.

    ``data`` is the element's bytes and its value, None where only its bytes are known.

    Raises:
        Broken: the array does not begin, go on or end as one, or an element is longer than ``longest``.
    """
    scanner = _Scanner(chunks, longest)
    if scanner.next() != b"[":
        raise Broken(Kind.NOT_JSON, f"expected [ and the elements of an array, got {scanner.excerpt()}")
    scanner.at += 1
    number = 1
    if scanner.next() == b"]":
        scanner.at += 1
    else:
        follows = b","
        while follows == b",":
            element, value = scanner.element()
            yield number, (element, value), len(element), False
            follows = scanner.next()
            if follows == b"":
                raise Broken(Kind.CUT_OFF, "the file ends behind the element before, without ]: was it cut off?")
            if follows not in (b",", b"]"):
                raise Broken(Kind.NOT_JSON, f"expected , or ] behind the element before, got {scanner.excerpt()}")
            number += 1
            scanner.at += 1
    if scanner.next():
        raise Broken(Kind.NOT_JSON, f"the array has ended, but {scanner.excerpt()} follows")


class _Scanner:
    """The bytes at hand, and where in them the next value begins."""

    def __init__(self, chunks: Iterator[bytes], longest: int) -> None:
        self._chunks, self._longest = chunks, longest
        self._data, self.at = b"", 0

    def next(self) -> bytes:
        """The next byte that is not blank, which stays; empty at the end of the file."""
        while True:
            match = BLANK.match(self._data, self.at)
            assert match is not None, "the pattern matches nothing, too"
            self.at = match.end()
            if self.at < len(self._data) or not self._more():
                return self._data[self.at : self.at + 1]

    def element(self) -> tuple[bytes, Any]:
        """The bytes of the next value, and the value, where orjson has it already."""
        first = self.next()
        end, value = self._tried() if first == b"{" else (0, None)
        if value is None:
            end = self._closed() if first in (b"{", b"[", b'"') else self._scalar()
        if end - self.at > self._longest:
            raise Broken(Kind.TOO_LONG, too_long(self._longest))
        found = self._data[self.at : end]
        self.at = end
        return found, value

    def _tried(self) -> tuple[int, Any]:
        """The end and the value of an object that orjson takes: one has but one end, and most end at the first try."""
        for match in islice(PERHAPS_END.finditer(self._data, self.at), TRIES):
            value = fast_loads(self._data[self.at : match.start() + 1])
            if value is not None:
                return match.start() + 1, value
        return 0, None

    def excerpt(self) -> str:
        """What is there instead of what should be."""
        found = self._data[self.at : self.at + 20].decode("utf-8", "replace")
        return ascii(found) if found else "the end of the file"

    def _closed(self) -> int:
        depth, behind = 0, 0  # how far behind the start of the value what was looked at goes
        while True:
            for token in TOKEN.finditer(self._data, self.at + behind):
                kind = token.lastindex
                if kind == OPENING:
                    depth += 1
                elif kind == IN_STRING:
                    behind = token.start() - self.at
                    break
                else:
                    depth -= kind == CLOSING
                    if depth == 0:
                        return token.end()
            else:
                behind = len(self._data) - self.at
            self._read_on()

    def _scalar(self) -> int:
        while True:
            match = SCALAR.match(self._data, self.at)
            assert match is not None, "the pattern matches nothing, too"
            if match.end() < len(self._data):
                if match.end() == self.at:
                    raise Broken(Kind.NOT_JSON, f"expected an element, got {self.excerpt()}")
                return match.end()
            self._read_on()

    def _read_on(self) -> None:
        if len(self._data) - self.at > self._longest:
            raise Broken(Kind.TOO_LONG, too_long(self._longest))
        if not self._more():
            raise Broken(Kind.CUT_OFF, "the file ends within this element: was it cut off?")

    def _more(self) -> bool:
        """Read as much again as is at hand, so that a long string is looked at a few times only."""
        parts = [self._data[self.at :]]
        held = wanted = len(parts[0])
        while held <= 2 * wanted and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            held += len(chunk)
        self._data, self.at = b"".join(parts), 0
        return held > wanted
