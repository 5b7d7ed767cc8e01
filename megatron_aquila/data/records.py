"""What reading a corpus gives: documents, and records that are none, each with the kind of its fault."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from megatron_aquila.errors import ConfigError, Problem

MAX_DOCUMENT_BYTES: Final = 128 << 20
ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "{": "{", "}": "}"}
SEGMENT: Final = re.compile(r"\{\{|\}\}|\\(.)|\{([^{}]*)\}|([^{}\\]+)|(.)", re.DOTALL)
NOT_PLAIN: Final = re.compile(r"[.\[\]!:]")


class Kind(StrEnum):
    """Why a record is no document."""

    NOT_JSON = "not JSON"
    NOT_AN_OBJECT = "not an object"
    MISSING_KEY = "missing key"
    NULL = "null"
    WRONG_TYPE = "wrong type"
    DUPLICATE_KEY = "duplicate key"
    NOT_UTF8 = "not UTF-8"
    BYTE_ORDER_MARK = "byte order mark"
    LONE_SURROGATE = "lone surrogate"
    TOO_LONG = "too long"
    CUT_OFF = "cut off"
    DAMAGED = "damaged file"


class Document(NamedTuple):
    """One record's texts: one for each key, or the one of the template.

    ``line`` counts from 1 at the start of the piece: a line of JSON lines or text, an element of an array, a row of
    parquet; ``LineNumbers`` makes it the file's. ``meta`` has the fields to keep that the record has. ``num_bytes`` is
    the length of the record as it was read, unpacked.
    """

    texts: tuple[str, ...]
    path: Path
    line: int
    meta: Mapping[str, object] | None
    num_bytes: int


class Joined(NamedTuple):
    """Texts of consecutive records, end to end as an encoder takes them; ``num_bytes`` as Document's."""

    text: bytes
    documents: int
    num_bytes: int


class Join(Protocol):
    """Joins the texts of plain lines, from a byte of a block of lines on, up to one that is not, or to enough."""

    def __call__(self, block: bytes, start: int) -> tuple[Joined, int, int]:
        """What was joined, and how many bytes and lines that took."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is no document: where, of which kind, and why in words; ``line`` is the file's own.

    ``ends_piece``: what follows it in the piece could not be read, so that more than this record is lost.
    """

    path: Path
    line: int
    kind: Kind
    why: str
    ends_piece: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.why}"


# A record as it is cut from a file, a plain tuple as there are many: its (first) line, element or row, as in Document;
# its JSON or text as bytes, or its row as a dict; the bytes it takes; whether it ends only because the file does.
Raw = tuple[int, Any, int, bool]
Found = tuple[tuple[str, ...], Mapping[str, object] | None]
Parse = Callable[[Any], Found]  # from a record's data to its texts and its fields to keep; raises BadValue


class BadValue(Exception):
    """Raised inside the readers: the record at hand is no document."""

    def __init__(self, kind: Kind, why: str) -> None:
        self.kind, self.why = kind, why
        super().__init__(why)


class Broken(Exception):
    """Raised inside the readers: where the next record ends is not known, so that the rest of the piece is lost."""

    def __init__(self, kind: Kind, why: str) -> None:
        self.kind, self.why = kind, why
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class Template:
    """Text and fields in turn: ``literals[0] fields[0] literals[1] ... literals[-1]``, one literal more."""

    literals: tuple[str, ...]
    fields: tuple[str, ...]

    def join(self, values: Sequence[str]) -> str:
        """The text with a value for each of ``fields``."""
        parts = [part for pair in zip(self.literals, values, strict=False) for part in pair]
        return "".join([*parts, self.literals[-1]])


def parse_template(source: str) -> Template:
    r"""Read ``{title}\n{content}``: names in braces, ``\n``, ``\t``, ``\r``, ``\\``; ``{{`` and ``}}`` are braces.

    A name is a key of the record, and nothing else: unlike Python's ``str.format`` it reaches into no object.

    Raises:
        ConfigError: a brace without its partner, a name that is more than a key, an unknown escape, or no field.
    """
    literals, fields = [""], []
    for match in SEGMENT.finditer(source):
        escape, name, plain, stray = match.groups()
        if stray is not None or (escape is not None and escape not in ESCAPES):
            known = r"write {{ or }} for a brace, \\ for a backslash; \n, \t and \r are known"
            raise _wrong_template(source, f"{match[0]!r} at character {match.start() + 1} stands alone", known)
        if name is None:
            literals[-1] += plain or (match[0][0] if escape is None else ESCAPES[escape])
        elif not name or NOT_PLAIN.search(name):
            raise _wrong_template(source, f"{match[0]!r} is no plain key", "use {key} with a key of the records")
        else:
            fields.append(name)
            literals.append("")
    if not fields:
        raise _wrong_template(source, "it has no field, so that all documents are the same", r"use {title}\n{content}")
    return Template(tuple(literals), tuple(fields))


def _wrong_template(source: str, why: str, way_out: str) -> ConfigError:
    return ConfigError([Problem("--text-template", repr(source), why, way_out)])


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What is taken of a record: the text under each of ``keys``, or one text made by ``template``.

    ``keep_meta`` names fields that go along. A record longer than ``max_document_bytes`` is bad and is not held in
    memory.
    """

    keys: tuple[str, ...] = ("text",)
    template: Template | None = None
    keep_meta: tuple[str, ...] = ()
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def fields(self) -> tuple[str, ...]:
        """The keys that a record must have."""
        return self.keys if self.template is None else self.template.fields

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that are read at all, each once."""
        return tuple(dict.fromkeys((*self.fields, *self.keep_meta)))


def texts_of(options: ReadOptions) -> Callable[[Any], tuple[str, ...]]:
    """The function from a record to its texts; it raises BadValue where the record has none."""
    template, fields = options.template, options.fields
    if template is not None:
        return lambda record: (template.join([text_under(record, key) for key in fields]),)
    if len(fields) == 1:
        (key,) = fields
        return lambda record: (text_under(record, key),)
    return lambda record: tuple([text_under(record, key) for key in fields])


def text_under(record: Any, key: str) -> str:
    """The string under ``key``.

    Raises:
        BadValue: the record is no object, has no such key, or has something else there.
    """
    try:
        text = record[key]
    except (KeyError, TypeError, IndexError):
        raise _no_text(record, key) from None
    if type(text) is str:
        return text
    if text is None:
        raise BadValue(Kind.NULL, f"{key!r} is null")
    raise BadValue(Kind.WRONG_TYPE, f"{key!r} is not a string but a {type(text).__name__}")


def _no_text(record: object, key: str) -> BadValue:
    if not isinstance(record, dict):
        way_out = "; if the file is one JSON array, name it .json or say --input-format json-array"
        hint = way_out if isinstance(record, list) else ""
        why = f"expected an object with the key {key!r}, got a {type(record).__name__}{hint}"
        return BadValue(Kind.NOT_AN_OBJECT, why)
    found = ", ".join(map(repr, record)) or "none"
    return BadValue(Kind.MISSING_KEY, f"no key {key!r}; it has {found}; choose with --json-keys or --text-template")


def meta_of(record: Mapping[str, object], keep: Sequence[str]) -> Mapping[str, object] | None:
    """The fields to keep that are there; None where none is asked for."""
    return {name: record[name] for name in keep if name in record} if keep else None


def check_surrogates(texts: Sequence[str], names: Sequence[str]) -> None:
    r"""Raise BadValue where a text has half of a surrogate pair, as ``"\ud83d"`` of JSON gives: it has no UTF-8."""
    for text, name in zip(texts, names, strict=False):
        try:
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = text[error.start].encode("ascii", "backslashreplace").decode()
            why = f"{name!r} has half a surrogate pair, {found}, at character {error.start + 1}"
            raise BadValue(Kind.LONE_SURROGATE, why) from error


def too_long(limit: int) -> str:
    """Why a record is not held in memory."""
    return f"longer than {limit:,} bytes, the --max-document-bytes"
