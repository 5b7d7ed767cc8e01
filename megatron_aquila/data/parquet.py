"""Rows of parquet files, a batch at a time. The one door to pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from megatron_aquila.data.records import (
    BadValue,
    Broken,
    Found,
    Kind,
    Parse,
    Raw,
    ReadOptions,
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


def parquet_rows(path: Path, group: int, options: ReadOptions) -> Iterator[Raw]:
    """The rows of a row group, numbers from 1, as dicts; only the columns that are asked for are read.

    Raises:
        Broken: there is no column of a text.
    """
    number = 1
    with _file(path) as file:
        known = file.schema_arrow.names
        if missing := [key for key in options.fields if key not in known]:
            why = f"no column {missing[0]!r}; it has {', '.join(map(repr, known))}; choose with --json-keys"
            raise Broken(Kind.MISSING_KEY, why)
        columns = [name for name in options.columns if name in known]
        for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns, use_threads=False):
            size = batch.nbytes // max(batch.num_rows, 1)
            for values in zip(*[_values(batch.column(name)) for name in columns], strict=True):
                yield number, dict(zip(columns, values, strict=True)), size, False
                number += 1


def row_parser(options: ReadOptions) -> Parse:
    """The function from a row to its texts and its fields to keep."""
    texts = texts_of(options)

    def parse(row: dict[str, Any]) -> Found:
        for value in row.values():
            if isinstance(value, BadValue):
                raise value
        found = texts(row)
        if any(len(text.encode("utf-8")) > options.max_document_bytes for text in found):
            raise BadValue(Kind.TOO_LONG, too_long(options.max_document_bytes))
        return found, meta_of(row, options.keep_meta)

    return parse


def _values(column: Any) -> list[Any]:
    """Python's values; where one is not UTF-8, a BadValue in its place."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return BadValue(Kind.NOT_UTF8, f"not UTF-8: byte {error.start + 1} of the record is 0x{byte:02x}")
