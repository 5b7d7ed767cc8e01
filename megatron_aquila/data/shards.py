"""A worker's part: one piece of the corpus to one folder of token streams, whole or not there at all."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, replace
from operator import add, sub
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from megatron_aquila.data.encoders import (
    Encoded,
    Encoder,
    GigatokenEncoder,
    ReferenceEncoder,
    check_ids,
    divided,
    first_difference,
)
from megatron_aquila.data.filters import Drop, Dropped, LengthLimits, hashes_of, text_hash
from megatron_aquila.data.inputs import Format, Piece
from megatron_aquila.data.provenance import provenance_line
from megatron_aquila.data.readers import read_joined, read_piece
from megatron_aquila.data.records import BadRecord, Document, Join, Joined, ReadOptions
from megatron_aquila.data.streams import LineNumbers
from megatron_aquila.errors import DataError

BATCH_BYTES: Final = 1 << 20  # of text, tokenized at once
CHECKED_CHARACTERS: Final = 1 << 9  # of each piece, on which the fast encoder is held against the slow reference
LONGEST_JOINED: Final = (
    1 << 24
)  # bytes of a line that others than Python may look at: of few tokens enough for any index
BATCH_BAD: Final = 1 << 12  # bad records that are held at most
FACTS: Final = "facts.json"
META, BAD, HASHES = "meta.jsonl", "bad.jsonl", "hashes"


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was done: bytes of records as read, documents, tokens of all keys; and what was left out, by reason."""

    num_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    bad_records: int = 0
    too_short: int = 0
    too_long: int = 0
    duplicates: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*map(sub, astuple(self), astuple(other)))

    def dropped(self) -> dict[Drop, int]:
        """Good documents that were left out."""
        return {Drop.TOO_SHORT: self.too_short, Drop.TOO_LONG: self.too_long, Drop.DUPLICATE: self.duplicates}


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece, or a block of one, that is done: what it holds and the largest id of each key (-1 without tokens).

    ``file_bytes`` and ``lines_before`` are the piece's ``num_bytes`` and ``lines_before``.
    """

    index: int
    block: int
    file_bytes: int
    lines_before: int | None
    counts: Counts
    largest: tuple[int, ...]

    @property
    def place(self) -> tuple[int, int]:
        """Shards are joined in this order."""
        return self.index, self.block


@dataclass(frozen=True, slots=True)
class Step:
    """What a worker tells while it works: what was done since it last told; ``file_bytes`` of the input as on disk."""

    counts: Counts
    file_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWriter:
    """Tokenizes pieces into ``folder``; sent to each worker once, and the same on every machine.

    A shard is a folder ``000042-000007``, for piece 42 and block 7, with ``KEY.bin`` (tokens), ``KEY.lengths`` (int32,
    one a document; 0 for an empty one), ``meta.jsonl`` (a line of provenance a document, all numbers counted from the
    start of the piece or block), ``bad.jsonl`` (one JSON object a line), ``hashes`` (16 bytes a document, where these
    are compared later) and ``facts.json``; it gets its name when all is in.
    """

    folder: Path
    names: tuple[str, ...]
    encoder: Encoder
    read: ReadOptions
    end: int | None
    dtype: np.dtype[Any]
    skip_bad_records: bool
    limits: LengthLimits
    deduplicate: bool
    lines: LineNumbers = field(default_factory=LineNumbers)  # each worker's own: a file of bad lines is counted once

    def __call__(self, piece: Piece, tell: Callable[[Step], None]) -> Shard:
        """Write the piece's shard, or find it finished by an earlier run.

        Raises:
            DataError: the piece cannot be read, a record is bad and not to be skipped, an id is outside the
                vocabulary, or the disk is full.
        """
        final = shard_folder(self.folder, (piece.index, piece.block))
        finished = read_shard(final)
        if finished is not None:
            tell(Step(finished.counts, piece.num_bytes))
            return finished
        shutil.rmtree(final, ignore_errors=True)  # what a power cut left of one
        temporary = final.with_name(f"{final.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            return self._write(piece, temporary, final, tell)
        except BrokenPipeError:  # of whoever is told
            raise
        except OSError as error:
            raise DataError(
                f"{temporary}: cannot be written: {error.strerror}; what was finished is kept: make room, and the same "
                "command goes on from there"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, piece: Piece, temporary: Path, final: Path, tell: Callable[[Step], None]) -> Shard:
        temporary.mkdir()
        largest = [-1] * len(self.names)
        shard = Shard(piece.index, piece.block, piece.num_bytes, piece.lines_before, Counts(), tuple(largest))
        told = 0
        with ExitStack() as stack:
            files = {name: stack.enter_context((temporary / name).open("wb")) for name in self.streams}
            for batch in _batches(self._records(piece)):
                if shard.counts.documents == 0:
                    self._check(piece, batch.texts())
                step, largest = self._write_batch(files, batch, shard.counts.documents)
                largest = list(map(max, shard.largest, largest))
                shard = replace(shard, counts=shard.counts + step, largest=tuple(largest))
                so_far = min(shard.counts.num_bytes, piece.num_bytes)  # a packed piece seems done before it is
                tell(Step(step, so_far - told))
                told = so_far
            tell(Step(Counts(), piece.num_bytes - told))
        sizes = {name: (temporary / name).stat().st_size for name in self.streams}
        (temporary / FACTS).write_text(json.dumps({**asdict(shard), "sizes": sizes}))
        try:
            temporary.rename(final)
        except OSError:
            if read_shard(final) is None:  # else a retry on another machine was faster: the same bytes
                raise
        return shard

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the files of a shard."""
        tokens = [f"{name}.{end}" for name in self.names for end in ("bin", "lengths")]
        meta, hashes = [META] if self.read.keep_meta else [], [HASHES] if self.deduplicate else []
        return (*tokens, *meta, *hashes, BAD)

    def _joiner(self, piece: Piece) -> Join | None:
        """Where nothing is asked of a document but the ids of one text, and its encoder can join them."""
        plain = piece.format is Format.JSON_LINES and self.read.template is None and len(self.read.keys) == 1
        if not plain or self.read.keep_meta or self.deduplicate or self.limits != LengthLimits():
            return None
        if not isinstance(self.encoder, GigatokenEncoder):
            return None
        longest = min(self.read.max_document_bytes, LONGEST_JOINED)
        return self.encoder.joiner(self.read.keys[0], longest, BATCH_BYTES)

    def _records(self, piece: Piece) -> Iterator[Joined | Document | BadRecord | Dropped]:
        join = self._joiner(piece)
        whole = read_piece(piece, self.read, self.lines)
        for record in whole if join is None else read_joined(piece, self.read, join, self.lines):
            if isinstance(record, Joined):
                yield record
            elif isinstance(record, BadRecord):
                if record.ends_piece:
                    raise DataError(f"{record}; mend the file, or leave it out: this is more than a line to skip")
                if not self.skip_bad_records:
                    raise DataError(f"{record}; mend the line, or leave such lines out with --on-bad-line skip")
                yield record
            else:
                reason = self.limits.dropped(record.texts)
                yield record if reason is None else Dropped(reason, record.num_bytes)

    def _check(self, piece: Piece, texts: Sequence[str]) -> None:
        """The first documents of every piece by both encoders."""
        if isinstance(self.encoder, ReferenceEncoder):
            return
        texts = [text[:CHECKED_CHARACTERS] for text in texts]
        why = first_difference(self.encoder, ReferenceEncoder(self.encoder.tokenizer), texts)
        if why is not None:
            raise DataError(f"{piece.path}: {why}; use --tokenizer-backend tokenizers")

    def _write_batch(self, files: Mapping[str, BinaryIO], batch: "_Batch", before: int) -> tuple[Counts, list[int]]:
        """Append a batch to the streams, ``before`` documents being in them."""
        documents, tokens, largest = batch.documents, 0, []
        vocab_size = self.encoder.tokenizer.vocab_size
        for column, name in enumerate(self.names):
            encoded = self._encoded(batch, column)
            largest.append(check_ids(encoded, vocab_size))
            files[f"{name}.bin"].write(encoded.tokens.astype(self.dtype).data)
            files[f"{name}.lengths"].write(_lengths(encoded, documents).data)
            tokens += len(encoded.tokens)
        if META in files:
            files[META].writelines(
                provenance_line(number, source=str(document.path), line=document.line, meta=document.meta)
                for number, document in enumerate(documents, before)
            )
        if HASHES in files:
            files[HASHES].write(hashes_of([text_hash(document.texts) for document in documents]).data)
        for record in batch.bad:
            said = {"file": str(record.path), "line": record.line, "kind": record.kind, "why": record.why}
            files[BAD].write(json.dumps(said).encode() + b"\n")
        done = Counts(documents=batch.num_documents, tokens=tokens, num_bytes=batch.num_bytes)
        return batch.left_out + done, largest

    def _encoded(self, batch: "_Batch", column: int) -> Encoded:
        if batch.joined is None:
            return self.encoder.encode([document.texts[column] for document in batch.documents], self.end)
        assert isinstance(self.encoder, GigatokenEncoder), f"{type(self.encoder).__name__} joins nothing"
        return self.encoder.encode_joined(batch.joined.text, batch.joined.documents, self.end)


def shard_folder(folder: Path, place: tuple[int, int]) -> Path:
    """Where a shard lies when it is whole."""
    index, block = place
    return folder / f"{index:06d}-{block:06d}"


def read_shard(path: Path) -> Shard | None:
    """What a finished shard says of itself; ``None`` where there is none, or not all of it.

    A power cut can leave names without what they stand for.
    """
    try:
        said = json.loads((path / FACTS).read_text())
        if any((path / name).stat().st_size != size for name, size in said["sizes"].items()):
            return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    shard = shard_of(said)
    assert shard_folder(path.parent, shard.place) == path, f"{path} holds shard {shard.place}"
    return shard


def shard_of(said: Mapping[str, Any]) -> Shard:
    """A shard as ``asdict`` and JSON made it a mapping, which may say more."""
    own = {name: said[name] for name in ("index", "block", "file_bytes", "lines_before")}
    return Shard(**own, counts=Counts(**said["counts"]), largest=tuple(said["largest"]))


class _Batch(NamedTuple):
    """Documents that are tokenized at once, and what was found among them; ``num_bytes`` of all good ones."""

    documents: list[Document]
    bad: list[BadRecord]
    left_out: Counts
    num_bytes: int
    joined: Joined | None = None  # instead of all of these

    @property
    def num_documents(self) -> int:
        """Good ones that are not left out."""
        return len(self.documents) if self.joined is None else self.joined.documents

    def texts(self) -> list[str]:
        """Those of the first documents, up to the one behind ``CHECKED_CHARACTERS``."""
        if self.joined is not None:
            return divided(self.joined.text, CHECKED_CHARACTERS)
        texts: list[str] = []
        characters = 0
        for document in self.documents:
            texts += document.texts
            characters += sum(map(len, document.texts))
            if characters > CHECKED_CHARACTERS:
                break
        return texts


def _batches(records: Iterator[Joined | Document | BadRecord | Dropped]) -> Iterator[_Batch]:
    """Documents of about a megabyte at once."""
    documents: list[Document] = []
    bad: list[BadRecord] = []
    dropped: list[Drop] = []
    num_bytes = 0
    for record in records:
        if isinstance(record, Joined):
            if documents or bad or dropped:
                yield _Batch(documents, bad, _left_out(bad, dropped), num_bytes)
                documents, bad, dropped, num_bytes = [], [], [], 0
            yield _Batch([], [], Counts(), record.num_bytes, record)
        elif isinstance(record, BadRecord):
            bad.append(record)
        else:
            num_bytes += record.num_bytes
            if isinstance(record, Dropped):
                dropped.append(record.reason)
            else:
                documents.append(record)
        if num_bytes >= BATCH_BYTES or len(bad) >= BATCH_BAD:
            yield _Batch(documents, bad, _left_out(bad, dropped), num_bytes)
            documents, bad, dropped, num_bytes = [], [], [], 0
    if documents or bad or dropped:
        yield _Batch(documents, bad, _left_out(bad, dropped), num_bytes)


def _left_out(bad: list[BadRecord], dropped: list[Drop]) -> Counts:
    short, long = dropped.count(Drop.TOO_SHORT), dropped.count(Drop.TOO_LONG)
    return Counts(bad_records=len(bad), too_short=short, too_long=long)


def _lengths(encoded: Encoded, batch: list[Document]) -> Any:
    if encoded.lengths.max(initial=0) > np.iinfo(np.int32).max:
        worst = batch[int(encoded.lengths.argmax())]
        raise DataError(f"{worst.path}:{worst.line}: more tokens than an index can say of one document; split it")
    return encoded.lengths.astype("<i4")
