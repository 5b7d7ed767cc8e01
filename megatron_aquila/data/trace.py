"""What a sample was read from: documents, tokens, bytes; and which samples read a document."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Final

import numpy as np

from megatron_aquila.data.samples import SampleSource
from megatron_aquila.errors import DataError

WIDTH: Final = 160  # characters of a text that are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one sample took of one sequence.

    ``tokens`` are the first and the end of its tokens in the sequence, ``bytes`` the same in ``PREFIX.bin``, both
    half-open. ``ids`` are the tokens.
    """

    prefix: str
    document: int
    sequence: int
    tokens: tuple[int, int]
    bytes: tuple[int, int]
    ids: tuple[int, ...]


def trace_sample(source: SampleSource, sample: int) -> list[Piece]:
    """The pieces of a sample in order, its last token included, which is a label only. As fast as reading it.

    Raises:
        DataError: there is no such sample.
    """
    if not 0 <= sample < len(source):
        raise DataError(f"sample {sample}: the run's index has {len(source)}, from 0 on")
    pieces = []
    for span in source.spans(sample):
        if span.start == span.stop:
            continue
        dataset = source.datasets[span.source]
        begin, width = int(dataset.offsets[span.sequence]), dataset.dtype.itemsize
        document = int(np.searchsorted(dataset.document_indices, span.sequence, side="right")) - 1
        pieces.append(
            Piece(
                prefix=dataset.prefix,
                document=document,
                sequence=span.sequence,
                tokens=(span.start, span.stop),
                bytes=(begin + span.start * width, begin + span.stop * width),
                ids=tuple(dataset.get(span.sequence, span.start, span.stop - span.start).tolist()),
            )
        )
    return pieces


def samples_of_document(source: SampleSource, document: int, *, prefix: str | None = None) -> list[int]:
    """The samples, ascending, that hold a token of a document of the data set ``prefix``. Searches the whole index.

    ``prefix`` may be the name of its files without the folder, such as ``zh_text_document``, what that begins with,
    such as ``zh``, or another part of it; with a single data set it may be left out.

    Raises:
        DataError: no such data set or document, or a part that several data sets share.
    """
    number = _find(source.names, prefix)
    dataset = source.datasets[number]
    if not 0 <= document < len(dataset.document_indices) - 1:
        raise DataError(f"{dataset.prefix}: document {document}: it has {len(dataset.document_indices) - 1}, from 0 on")
    first, end = dataset.document_indices[document : document + 2].tolist()
    found = [source.samples_with(number, sequence) for sequence in range(first, end)]
    return np.unique(np.concatenate(found)).tolist() if found else []


def format_piece(piece: Piece, decode: Callable[[Sequence[int]], str] | None, *, width: int | None = WIDTH) -> str:
    """Where the piece lies, and its text below, or its ids without a tokenizer.

    To ``width`` characters the text is one line, cut in the middle; with ``None`` it is whole, its own lines kept.
    """
    (start, stop), (first, end) = piece.tokens, piece.bytes
    place = f"{piece.prefix}: document {piece.document}, tokens {start} to {stop}, bytes {first} to {end}"
    text = " ".join(map(str, piece.ids)) if decode is None else decode(piece.ids)
    if width is None:
        return f"{place}\n{indent(text, '    ')}"
    text = " ".join(text.split())
    half = (width - 5) // 2
    return f"{place}\n    {text if len(text) <= width else f'{text[:half]} ... {text[-half:]}'}"


def _find(names: Sequence[str], prefix: str | None) -> int:
    if prefix is None:
        if len(names) == 1:
            return 0
        raise DataError(f"the run blends {len(names)} data sets; name one with --prefix: {', '.join(names)}")
    found = [number for number, name in enumerate(names) if name == prefix]
    found = found or [number for number, name in enumerate(names) if Path(name).name == Path(prefix).name]
    found = found or [number for number, name in enumerate(names) if Path(name).name.startswith(f"{prefix}_")]
    found = found or [number for number, name in enumerate(names) if prefix in Path(name).name]
    if len(found) != 1:
        why = "no data set" if not found else f"{len(found)} data sets"
        raise DataError(f"--prefix {prefix}: {why} of this name; the run reads {', '.join(names)}")
    return found[0]
