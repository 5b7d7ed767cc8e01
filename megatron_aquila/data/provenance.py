"""Where each document of a data set came from: PREFIX.meta.jsonl, a line a document, in the order of their numbers."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Final

from megatron_aquila.data.hashed import HashedFile
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.manifest import FileFacts
from megatron_aquila.errors import DataError

WAY_OUT: Final = "remove it to merge without"
LINES: Final = 1 << 12  # that are written at once
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


def named_provenance(dataset: IndexedDataset) -> Path | None:
    """The file under the name that the data set's manifest gives; None where it gives none, or no file is there."""
    name = None if dataset.manifest is None else dataset.manifest.origin.options.get("provenance")
    path = None if name is None else Path(dataset.prefix).with_name(str(name))
    return None if path is None or not path.exists() else path


def provenance_path(dataset: IndexedDataset) -> Path | None:
    """``named_provenance`` where it has the size that the manifest says, so that it is not another data set's."""
    path, said = named_provenance(dataset), provenance_facts(dataset)
    return None if path is None or (said is not None and path.stat().st_size != said.size) else path


def provenance_facts(dataset: IndexedDataset) -> FileFacts | None:
    """What the file must be; None where the data set's manifest does not say it."""
    return None if dataset.manifest is None else dataset.manifest.origin.provenance


def join_provenance(datasets: Sequence[IndexedDataset], path: Path) -> FileFacts:
    """Write what the files of all data sets say to ``path`` on the disk, documents numbered as they lie end to end.

    Returns the size and the hash of what was written.

    Raises:
        DataError: a data set has no such file, or one that is not a line a document; or one cannot be read or written.
    """
    try:
        with HashedFile(path) as joined:
            lines = renumbered(chain.from_iterable(map(_lines_of, datasets)), 0)
            while block := b"".join(islice(lines, LINES)):
                joined.write(block)
        return joined.facts()
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror}") from error


def _lines_of(dataset: IndexedDataset) -> Iterator[bytes]:
    """Every line of what says where the data set's documents came from; DataError unless it is a line a document."""
    path, number = provenance_path(dataset), 0
    if path is None:
        raise DataError(f"{dataset.prefix}: the file that says where its documents came from is not there")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if HEAD.match(line) is None:
                raise DataError(f"{path}:{number}: no line of provenance; {WAY_OUT}")
            yield line
    documents = len(dataset.document_indices) - 1
    if number != documents:
        raise DataError(f"{path}: {number:,} lines for the {documents:,} documents of {dataset.prefix}; {WAY_OUT}")


def document_origin(dataset: IndexedDataset, document: int) -> str | None:
    """Where a document came from, in words; None where the data set's manifest names no such file, or it is not there.

    That file may be another data set's by now, which is said instead.

    Raises:
        DataError: as ``find_provenance``.
    """
    path = provenance_path(dataset)
    if path is None and (other := named_provenance(dataset)) is not None:
        return f"an unknown place: {other} was replaced by another data set's"
    found = None if path is None else find_provenance(path, document)
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
