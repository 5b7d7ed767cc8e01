"""Where each document of a data set came from: PREFIX.meta.jsonl, a line a document, in the order of their numbers."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.errors import DataError

HEAD: Final = re.compile(rb'\{"document": \d+, "line": (\d+), ')


def provenance_line(number: int, *, source: str, line: int, meta: Mapping[str, object] | None) -> bytes:
    """One line: the document's number in its data set from 0, its file, its line there, and its kept fields.

    What JSON does not know, as parquet's dates, becomes a string.
    """
    record = {"document": number, "line": line, "source": source, "meta": dict(meta or {})}
    try:
        return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a field that is not text
        return json.dumps(record, default=str).encode("ascii") + b"\n"


def renumbered(lines: Iterable[bytes], first: int, lines_before: int = 0) -> Iterator[bytes]:
    """The same lines with their documents numbered from ``first`` on, and ``lines_before`` more in each line's number.

    So what a worker said of a piece alone is said of the whole, and what was left out leaves no gap.
    """
    for number, said in enumerate(lines, first):
        head = HEAD.match(said)
        assert head is not None, f"no line of provenance: {said[:60]!r}"
        yield b'{"document": %d, "line": %d, %b' % (number, int(head[1]) + lines_before, said[head.end() :])


def document_origin(dataset: IndexedDataset, document: int) -> str | None:
    """Where a document came from, in words; None where the data set's manifest names no such file, or it is not there.

    Raises:
        DataError: as ``find_provenance``.
    """
    name = None if dataset.manifest is None else dataset.manifest.origin.options.get("provenance")
    path = None if name is None else Path(dataset.prefix).with_name(str(name))
    found = None if path is None or not path.exists() else find_provenance(path, document)
    if found is None:
        return None
    kept = "".join(f", {key} {value}" for key, value in found["meta"].items())
    return f"{found['source']}:{found['line']}{kept}"


def find_provenance(path: Path, number: int) -> dict[str, Any] | None:
    """What the file says of a document, in a few reads however long it is; None where it says nothing.

    Raises:
        DataError: the file cannot be read, or has something else than such lines in their order.
    """
    try:
        with path.open("rb") as file:
            low, high = 0, file.seek(0, 2)  # the line begins in [low, high)
            while low < high:
                middle = (low + high) // 2
                start, line = _line_from(file, middle)
                if start >= high or not line:
                    high = middle
                    continue
                record = json.loads(line)
                if record["document"] == number:
                    return dict(record)
                if record["document"] < number:
                    low = start + len(line)
                else:
                    high = middle
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: byte {start:,} begins no line of provenance: {error}") from error
    return None


def _line_from(file: BinaryIO, position: int) -> tuple[int, bytes]:
    """The first line that begins at ``position`` or behind, and where."""
    file.seek(max(position - 1, 0))
    if position > 0:
        file.readline()
    return file.tell(), file.readline()
