"""From the bytes of a JSON object to its texts, or to what exactly is wrong with it."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from megatron_aquila.data.fast_json import fast_loads
from megatron_aquila.data.records import (
    BadValue,
    Found,
    Kind,
    Parse,
    ReadOptions,
    check_surrogates,
    meta_of,
    texts_of,
    too_long,
)
from megatron_aquila.data.streams import BYTE_ORDER_MARK, MAGIC, SUFFIXES

UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


def json_parser(options: ReadOptions) -> Callable[..., Found]:
    """The function from a JSON object, and its value where it is known, to its texts and its fields to keep.

    It raises BadValue. orjson, where it is installed, is only the fast way: an object that it refuses is judged by
    Python's ``json``, which takes ``NaN`` and ``Infinity`` as its ``dump`` writes them.
    """
    texts, keep, fields = texts_of(options), options.keep_meta, options.fields
    tokens = [json.dumps(key, ensure_ascii=False).encode() for key in dict.fromkeys(fields)]

    def parse(line: bytes, record: Any = None) -> Found:
        if len(line) > options.max_document_bytes:
            raise BadValue(Kind.TOO_LONG, too_long(options.max_document_bytes))
        record = fast_loads(line) if record is None else record
        if record is None:
            record = _loads(line)
            found = texts(record)
            check_surrogates(found, fields)
        else:
            found = texts(record)
        for token in tokens:  # a quote inside a string is escaped, so that this is a key, or a whole string
            if line.count(token) > 1:
                _refuse_twice(line, fields)
        return found, meta_of(record, keep) if keep else None

    return parse


def element_parser(options: ReadOptions) -> Parse:
    """``json_parser`` for an element of an array, of which the value may be known already."""
    parse = json_parser(options)
    return lambda element: parse(*element)


def _loads(line: bytes) -> Any:
    if line.startswith(BYTE_ORDER_MARK):
        raise BadValue(Kind.BYTE_ORDER_MARK, "a byte order mark within the file: were files joined that had one each?")
    try:
        return json.loads(utf8(line))
    except (ValueError, RecursionError) as error:
        raise BadValue(Kind.NOT_JSON, f"not JSON: {error}") from error


def utf8(data: bytes) -> str:
    """Decoded; BadValue names the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"not UTF-8: byte {error.start + 1} of the record is 0x{data[error.start]:02x}{_looks_like(data)}"
        raise BadValue(Kind.NOT_UTF8, why) from error


def _looks_like(data: bytes) -> str:
    """What bytes that are no text seem to be, where it is known, and what helps then."""
    if data.startswith(UTF16_MARKS):
        return "; it looks like UTF-16, which iconv makes UTF-8 of"
    for ending, packed in SUFFIXES.items():
        if data.startswith(MAGIC[packed]):
            return f"; it looks like {packed}: end the file's name in {ending}"
    return ""


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
