"""Streams of lines that only one process can read: it cuts them into blocks, so that all have something to do.

A packed file has no place to begin in but its start. The process that hands out the pieces unpacks it, which is cheap
beside making tokens of it, and sends the lines along. Where a block ends follows from the lines alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Final

from megatron_aquila.data.inputs import BY_LINES, Piece, Unpacked, num_bytes
from megatron_aquila.data.readers import file_chunks
from megatron_aquila.data.records import Broken
from megatron_aquila.data.streams import Compression, opened, whole_lines

MANY: Final = 64  # so many packed files keep all busy as they are, and each worker unpacks its own


@dataclass(frozen=True, slots=True)
class Corpus:
    """Pieces numbered from 0; those of the numbers ``cut`` are cut into blocks of about ``block_bytes`` of lines."""

    pieces: tuple[Piece, ...]
    cut: frozenset[int]
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the files as on disk."""
        return num_bytes(self.pieces)

    def parts(self, longest: int, after: tuple[int, int]) -> Iterator[Piece]:
        """All pieces in their order, some of them as blocks; those up to number and block ``after`` are left out.

        A piece that ``after`` lies in is read from its start. A line of more than ``longest`` bytes is not held.

        Raises:
            DataError: a file cannot be read, or the package that unpacks it is not installed. A file that is damaged
                within gives a last block that says so.
        """
        for piece in self.pieces[max(after[0], 0) :]:
            parts = _blocks(piece, self.block_bytes, longest) if piece.index in self.cut else iter([piece])
            yield from (part for part in parts if (part.index, part.block) > after)


def corpus_of(pieces: Sequence[Piece], block_bytes: int) -> Corpus:
    """To cut are pipes of lines, and of packed files of lines those that are more than a ``MANY``-th of all bytes."""
    enough = max(num_bytes(pieces) // MANY, block_bytes)
    return Corpus(tuple(pieces), frozenset(piece.index for piece in pieces if _is_cut(piece, enough)), block_bytes)


def _is_cut(piece: Piece, enough: int) -> bool:
    is_pipe = piece.num_bytes == 0
    is_large = piece.compression is not Compression.NONE and piece.num_bytes > enough
    return piece.format in BY_LINES and not piece.files and (is_pipe or is_large)


def _blocks(piece: Piece, block_bytes: int, longest: int) -> Iterator[Piece]:
    lines = read = 0
    with opened(piece.path) as raw:
        for number, unpacked in enumerate(_unpacked(file_chunks(raw, piece), block_bytes, longest)):
            before, read = read, _position(raw, piece)
            yield replace(piece, block=number, num_bytes=read - before, lines_before=lines, unpacked=unpacked)
            lines += unpacked.data.count(b"\n")


def _unpacked(chunks: Iterator[bytes], block_bytes: int, longest: int) -> Iterator[Unpacked]:
    try:
        for data, _ in whole_lines(chunks, block_bytes, longest):
            yield Unpacked(data)
    except Broken as error:
        yield Unpacked(fault=(error.kind, error.why))


def _position(raw: BinaryIO, piece: Piece) -> int:
    """How much of the file is read; a pipe does not know."""
    return 0 if piece.num_bytes == 0 else min(raw.tell(), piece.num_bytes)
