"""A worker's part: one piece of the corpus to one folder of token streams, whole or not there at all."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from megatron_aquila.data.encoders import Encoded, Encoder, ReferenceEncoder, check_ids, first_difference
from megatron_aquila.data.inputs import Piece
from megatron_aquila.data.readers import read_piece
from megatron_aquila.data.records import BadRecord, Document, ReadOptions
from megatron_aquila.data.streams import LineNumbers
from megatron_aquila.errors import DataError

BATCH_BYTES: Final = 1 << 20  # of text, tokenized at once
CHECKED_CHARACTERS: Final = 1 << 12  # of each piece, on which the fast encoder is held against the reference
FACTS: Final = "facts.json"


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was done: bytes of records as read, documents, tokens of all keys, records that are none."""

    num_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    bad_records: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.num_bytes + other.num_bytes,
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bad_records + other.bad_records,
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece that is done: what it holds and the largest id of each key (-1 without tokens)."""

    index: int
    counts: Counts
    largest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What a worker tells while it works: what was done since it last told; ``file_bytes`` of the input as on disk."""

    counts: Counts
    file_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWriter:
    """Tokenizes pieces into ``folder``; sent to each worker once, and the same on every machine.

    A shard is a folder ``000042`` with ``KEY.bin`` (tokens), ``KEY.lengths`` (int32, one a document; 0 for an empty
    one), ``meta.jsonl`` and ``bad.jsonl`` (one JSON object a line) and ``facts.json``; it gets its name when all is in.
    """

    folder: Path
    names: tuple[str, ...]
    encoder: Encoder
    read: ReadOptions
    end: int | None
    dtype: np.dtype[Any]
    skip_bad_records: bool

    def __call__(self, piece: Piece, tell: Callable[[Step], None]) -> Shard:
        """Write the piece's shard, or find it finished by an earlier run.

        Raises:
            DataError: the piece cannot be read, a record is bad and not to be skipped, an id is outside the
                vocabulary, or the disk is full.
        """
        final = shard_folder(self.folder, piece.index)
        finished = read_shard(final, piece.index)
        if finished is not None and self._is_whole(final, finished):
            tell(Step(finished.counts, piece.num_bytes))
            return finished
        if finished is not None:
            shutil.rmtree(final)
        temporary = final.with_name(f"{final.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            return self._write(piece, temporary, final, tell)
        except OSError as error:
            raise DataError(
                f"{temporary}: cannot be written: {error.strerror}; what was finished is kept: make room, and the same "
                "command goes on from there"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, piece: Piece, temporary: Path, final: Path, tell: Callable[[Step], None]) -> Shard:
        temporary.mkdir()
        shard = Shard(piece.index, Counts(), tuple(-1 for _ in self.names))
        told = 0
        with ExitStack() as stack:
            files = {name: stack.enter_context((temporary / name).open("wb")) for name in self.streams}
            for batch, bad in _batches(self._records(piece)):
                if shard.counts.documents == 0:
                    self._check(piece, batch)
                step, largest = self._write_batch(files, batch, bad)
                shard = Shard(shard.index, shard.counts + step, tuple(map(max, shard.largest, largest)))
                so_far = min(shard.counts.num_bytes, piece.num_bytes)  # a packed piece seems done before it is
                tell(Step(step, so_far - told))
                told = so_far
            tell(Step(Counts(), piece.num_bytes - told))
        (temporary / FACTS).write_text(json.dumps(asdict(shard)))
        try:
            temporary.rename(final)
        except OSError:
            if read_shard(final, piece.index) is None:  # else a retry on another machine was faster: the same bytes
                raise
        return shard

    def _is_whole(self, folder: Path, shard: Shard) -> bool:
        """Whether the sizes are what was written: a power cut can leave names without what they stand for."""
        sizes = {name: (folder / name).stat().st_size if (folder / name).exists() else -1 for name in self.streams}
        tokens = sum(sizes[f"{name}.bin"] for name in self.names)
        lengths = {sizes[f"{name}.lengths"] for name in self.names}
        return tokens == shard.counts.tokens * self.dtype.itemsize and lengths == {shard.counts.documents * 4}

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the files of a shard."""
        tokens = [f"{name}.{end}" for name in self.names for end in ("bin", "lengths")]
        return (*tokens, *(["meta.jsonl"] if self.read.keep_meta else []), "bad.jsonl")

    def _records(self, piece: Piece) -> Iterator[Document | BadRecord]:
        for record in read_piece(piece, self.read, LineNumbers()):
            if isinstance(record, BadRecord):
                if record.ends_piece:
                    raise DataError(f"{record}; mend the file, or leave it out: this is more than a line to skip")
                if not self.skip_bad_records:
                    raise DataError(f"{record}; mend the line, or leave such lines out with --on-bad-line skip")
            yield record

    def _check(self, piece: Piece, batch: list[Document]) -> None:
        """The first documents of every piece by both encoders."""
        if isinstance(self.encoder, ReferenceEncoder):
            return
        texts: list[str] = []
        characters = 0
        for document in batch:
            texts += document.texts
            characters += sum(map(len, document.texts))
            if characters > CHECKED_CHARACTERS:
                break
        texts = [text[:CHECKED_CHARACTERS] for text in texts]
        why = first_difference(self.encoder, ReferenceEncoder(self.encoder.tokenizer), texts)
        if why is not None:
            raise DataError(f"{piece.path}: {why}; use --tokenizer-backend tokenizers")

    def _write_batch(
        self, files: Mapping[str, BinaryIO], batch: list[Document], bad: list[BadRecord]
    ) -> tuple[Counts, list[int]]:
        tokens, largest = 0, []
        vocab_size = self.encoder.tokenizer.vocab_size
        for column, name in enumerate(self.names):
            encoded = self.encoder.encode([document.texts[column] for document in batch], self.end)
            largest.append(check_ids(encoded, vocab_size))
            files[f"{name}.bin"].write(encoded.tokens.astype(self.dtype).data)
            files[f"{name}.lengths"].write(_lengths(encoded, batch).data)
            tokens += len(encoded.tokens)
        if "meta.jsonl" in files:
            lines = [json.dumps(document.meta, ensure_ascii=False, default=str) + "\n" for document in batch]
            files["meta.jsonl"].write("".join(lines).encode("utf-8", errors="surrogatepass"))
        for record in bad:
            said = {"file": str(record.path), "line": record.line, "kind": record.kind, "why": record.why}
            files["bad.jsonl"].write(json.dumps(said).encode() + b"\n")
        return Counts(sum(document.num_bytes for document in batch), len(batch), tokens, len(bad)), largest


def shard_folder(folder: Path, index: int) -> Path:
    """Where a shard lies when it is whole."""
    return folder / f"{index:06d}"


def read_shard(path: Path, index: int) -> Shard | None:
    """What a finished shard says of itself; ``None`` where there is none."""
    try:
        said = json.loads((path / FACTS).read_text())
    except FileNotFoundError:
        return None
    assert said["index"] == index, f"{path} holds shard {said['index']}"
    return Shard(index, Counts(**said["counts"]), tuple(said["largest"]))


def _batches(records: Iterator[Document | BadRecord]) -> Iterator[tuple[list[Document], list[BadRecord]]]:
    """Documents of about a megabyte at once, and the bad records among them."""
    batch: list[Document] = []
    bad: list[BadRecord] = []
    num_bytes = 0
    for record in records:
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        batch.append(record)
        num_bytes += record.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch, bad
            batch, bad, num_bytes = [], [], 0
    if batch or bad:
        yield batch, bad


def _lengths(encoded: Encoded, batch: list[Document]) -> Any:
    if encoded.lengths.max(initial=0) > np.iinfo(np.int32).max:
        worst = batch[int(encoded.lengths.argmax())]
        raise DataError(f"{worst.path}:{worst.line}: more tokens than an index can say of one document; split it")
    return encoded.lengths.astype("<i4")
