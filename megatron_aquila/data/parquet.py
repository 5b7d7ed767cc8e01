"""Rows of parquet files, a batch at a time. The one door to pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from megatron_aquila.data.records import (
    BadValue,
    Kind,
    Parsed,
    ReadOptions,
    Records,
    Refused,
    meta_of,
    texts_of,
    too_long,
)
from megatron_aquila.errors import DataError

ROWS: Final = 256  # held at once


@contextmanager
def _file(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile.

    Raises:
        DataError: pyarrow is not installed, or the file is not parquet or damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("parquet files need the pyarrow package: pip install 'megatron_aquila[data]'") from error
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read: {why}") from error


def row_groups(path: Path) -> list[tuple[int, int]]:
    """Rows and bytes on disk of each row group.

    Raises:
        DataError: pyarrow is not installed, or the file is not parquet or damaged.
    """
    with _file(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        return [(group.num_rows, _packed_bytes(group)) for group in groups]


def _packed_bytes(group: Any) -> int:
    return sum(group.column(number).total_compressed_size for number in range(group.num_columns))


def parquet_rows(path: Path, group: int, options: ReadOptions) -> Records:
    """A record for each row of a row group, numbers from 1; only the columns that are asked for are read."""
    texts = texts_of(options)
    number = 0
    with _file(path) as file:
        known = file.schema_arrow.names
        for key in options.fields:
            if key not in known:
                why = f"no column {key!r}; it has {', '.join(map(repr, known))}; choose with --json-keys"
                yield Refused(1, BadValue(Kind.MISSING_KEY, why, ends_piece=True))
                return
        columns = [name for name in options.columns if name in known]
        for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns, use_threads=False):
            for row in range(batch.num_rows):
                number += 1
                try:
                    record = {name: _value(batch.column(name)[row], name) for name in columns}
                    found = texts(record)
                    size = sum(len(text.encode("utf-8")) for text in found)
                    if size > options.max_document_bytes:
                        raise too_long(options.max_document_bytes)
                    yield Parsed(found, meta_of(record, options.keep_meta), number, size)
                except BadValue as error:
                    yield Refused(number, error)


def _value(cell: Any, name: str) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        why = f"not UTF-8: byte {error.start + 1} of {name!r} is 0x{error.object[error.start]:02x}"
        raise BadValue(Kind.NOT_UTF8, why) from error
