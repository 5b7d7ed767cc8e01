"""Text to tokens on disk: a corpus in, one ``PREFIX_KEY_document`` data set out for each key.

The corpus is cut into pieces; workers make a shard of tokens of each; shards are appended in the order of the corpus.
So the bytes depend on the corpus, the tokenizer and the options alone: not on workers, machines, cuts or restarts.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from megatron_aquila.data.blocks import Corpus, corpus_of
from megatron_aquila.data.encoders import choose_encoder
from megatron_aquila.data.indexed import token_dtype
from megatron_aquila.data.inputs import Piece, num_bytes, plan_pieces
from megatron_aquila.data.manifest import Manifest, Origin, SourceFile, TokenizerFacts, package_versions
from megatron_aquila.data.output import Output, document_prefix, final_paths, is_output_of, partial_folder
from megatron_aquila.data.preprocess_settings import PreprocessSettings, check_settings
from megatron_aquila.data.readers import line_of, read_piece
from megatron_aquila.data.records import BadRecord, ReadOptions
from megatron_aquila.data.shards import BAD, META, Counts, Shard, ShardWriter, Step
from megatron_aquila.data.streams import STDIN, LineNumbers
from megatron_aquila.data.tokenizer import Tokenizer, tokenizer_facts
from megatron_aquila.data.workers import beside, kept_for_good, ordered_map
from megatron_aquila.errors import ConfigError, DataError, Problem

PIECES: Final = 256  # a corpus is cut into about so many,
SMALLEST_PIECE, LARGEST_PIECE = 2 << 20, 32 << 20  # within these bounds in bytes
LARGEST_BLOCK: Final = 8 << 20  # what is unpacked for others is held in memory
SAMPLED_PIECES, SAMPLED_RECORDS, SAMPLED_CHARACTERS = 8, 64, 1 << 15  # what gigatoken must prove itself on


@dataclass(slots=True)
class Progress:
    """What is done, live: ``file_bytes`` of ``total_file_bytes`` as on disk (0 of standard input).

    ``resumed`` is the part of ``counts`` that an earlier run did; ``seconds`` since this one began.
    """

    total_file_bytes: int
    file_bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    resumed: Counts = field(default_factory=Counts)
    resumed_file_bytes: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since this run began."""
        return time.perf_counter() - self.started

    @property
    def bytes_per_second(self) -> float:
        """Of this run, in bytes of the records as they were read."""
        return (self.counts.num_bytes - self.resumed.num_bytes) / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """By the share of the files that is read; ``None`` where it cannot be told."""
        done = self.file_bytes - self.resumed_file_bytes
        return None if done <= 0 else self.seconds * (self.total_file_bytes - self.file_bytes) / done


@dataclass(frozen=True, slots=True)
class Done:
    """What was made: the totals and each data set's manifest by its prefix."""

    progress: Progress
    manifests: dict[str, Manifest]


def preprocess(
    settings: PreprocessSettings,
    tokenizer: Tokenizer,
    *,
    report: Callable[[Progress], None],
    say: Callable[[str], None],
) -> Done:
    """Tokenize a corpus into ``PREFIX_KEY_document.bin``, ``.idx`` and ``.manifest.json``, in bounded memory.

    All appears under its final names only when the whole is written. What was begun is kept in ``PREFIX.partial``, and
    the same settings go on from there. ``report`` is called from any thread, one call at a time, about once a megabyte;
    ``say`` gets lines for the user.

    Raises:
        ConfigError: settings that make no sense, a data set that is there already, or an unfinished run with others.
        DataError: a file cannot be read or written, a line is bad and ``skip_bad_lines`` is not set, there is no
            document left at all, or a worker died.
    """
    check_settings(settings, tokenizer)
    planned = _plan(settings)
    _check_inputs(settings, planned)
    pieces = _share(planned, settings.shard)
    corpus = corpus_of(pieces, min(_piece_bytes(pieces), LARGEST_BLOCK))
    _check_engine(settings, corpus)
    with kept_for_good(), beside(lambda: tokenizer_facts(tokenizer)) as facts_beside:
        chosen = choose_encoder(settings.backend, tokenizer, lambda: list(_sample(pieces, settings.read)))
        facts = facts_beside()
    say(f"tokenizer backend: {chosen.why}")
    deciding = _deciding(settings, facts, tokenizer.allow_special_tokens)
    whole = None if settings.shard is None else _digest(planned, deciding)
    if settings.deduplicate and settings.shard is not None:
        say("--deduplicate with --shard: equal documents are found within this part, not between parts")
    writer = ShardWriter(
        folder=partial_folder(settings.prefix).absolute(),
        names=settings.names,
        encoder=chosen.encoder,
        read=settings.read,
        end=tokenizer.eod if settings.append_eod else None,
        dtype=token_dtype(tokenizer.vocab_size),
        skip_bad_records=settings.skip_bad_lines,
        limits=settings.limits,
        deduplicate=settings.deduplicate,
    )
    output = Output(
        settings.prefix,
        names=settings.names,
        streams=writer.streams,
        dtype=writer.dtype,
        plan=_identity(settings, deciding, whole, corpus),
        overwrite=settings.overwrite,
    )
    try:
        origin = _origin(settings, facts, tokenizer.allow_special_tokens, whole, pieces)
        return _run(settings, writer, output, corpus, origin, report, say)
    finally:
        output.close()


def _run(
    settings: PreprocessSettings,
    writer: ShardWriter,
    output: Output,
    corpus: Corpus,
    origin: Origin,
    report: Callable[[Progress], None],
    say: Callable[[str], None],
) -> Done:
    done, total = output.file_bytes, corpus.num_bytes
    progress = Progress(total, done, output.counts, output.counts, done)
    if output.num_shards > 0:
        say(f"going on in {output.folder}: {output.num_shards:,} shards were done, {done:,} of {total:,} bytes")
    lock = threading.Lock()

    def tell(step: Step) -> None:
        with lock:
            progress.counts += step.counts
            progress.file_bytes += step.file_bytes
            report(progress)

    lines = LineNumbers()
    with closing(_shards(settings, writer, corpus, output.last, tell)) as shards:
        for shard in shards:
            before = shard.lines_before
            if before is None:
                before = line_of(corpus.pieces[shard.index], 0, lines) if META in writer.streams else 0
            kept = output.append(shard, before)
            with lock:
                progress.counts += kept.counts - shard.counts
    if output.counts.documents == 0 and settings.shard is None:
        why = _nothing_left(output)
        output.discard()
        raise DataError(f"{', '.join(settings.inputs)}: no document found{why}")
    manifests = output.finish(replace(origin, options={**origin.options, "left_out": left_out(output.counts)}))
    progress.counts = output.counts
    return Done(progress, {document_prefix(settings.prefix, name): manifest for name, manifest in manifests.items()})


def left_out(counts: Counts) -> dict[str, int]:
    """How many records of the corpus are no documents of the output, by reason; reasons that there are."""
    reasons = {"bad": counts.bad_records, **{str(reason): count for reason, count in counts.dropped().items()}}
    return {reason: count for reason, count in reasons.items() if count > 0}


def _nothing_left(output: Output) -> str:
    """Why, with the first bad line: its report goes with the rest."""
    found = "".join(f", {count:,} {reason}" for reason, count in left_out(output.counts).items())
    with (output.folder / BAD).open() as file:
        first = file.readline()
    if not first:
        return found
    bad = json.loads(first)
    return f"{found}; the first bad line is {bad['file']}:{bad['line']}: {bad['why']}"


def _shards(
    settings: PreprocessSettings,
    writer: ShardWriter,
    corpus: Corpus,
    after: tuple[int, int],
    tell: Callable[[Step], None],
) -> Generator[Shard, None, None]:
    parts = corpus.parts(settings.read.max_document_bytes, after)
    if settings.engine == "ray":
        from megatron_aquila.data.ray_engine import ray_map

        return ray_map(writer, parts, tell=tell)
    # Of blocks nobody knows how many there will be.
    most = settings.workers if corpus.cut else max(len(corpus.pieces), 1)
    return ordered_map(writer, parts, workers=1 if _is_read_here(corpus) else min(settings.workers, most), tell=tell)


def _is_read_here(corpus: Corpus) -> bool:
    """Whether standard input is a piece as it is: a worker has another standard input."""
    return any(piece.path == STDIN and piece.index not in corpus.cut for piece in corpus.pieces)


def _plan(settings: PreprocessSettings) -> list[Piece]:
    """Pieces of a size that depends on the corpus only; also of small files so many that each part gets some."""
    kinds: dict[str, Any] = {
        "input_format": settings.input_format,
        "text_documents": settings.text_documents,
        "leave_out": is_output_of(settings.output_prefix),
    }
    whole = plan_pieces(settings.inputs, piece_bytes=1 << 62, **kinds)
    together = min(num_bytes(whole) // PIECES, LARGEST_PIECE)
    return plan_pieces(settings.inputs, piece_bytes=_piece_bytes(whole), together_bytes=together, **kinds)


def _piece_bytes(pieces: Sequence[Piece]) -> int:
    return min(max(num_bytes(pieces) // PIECES, SMALLEST_PIECE), LARGEST_PIECE)


def _share(pieces: Sequence[Piece], shard: tuple[int, int] | None) -> list[Piece]:
    """The pieces whose middle lies in the i-th of n equal parts of all bytes, numbered from 0; each is somebody's."""
    if shard is None:
        return list(pieces)
    index, count = shard
    total, before = num_bytes(pieces), 0
    mine: list[Piece] = []
    for piece in pieces:
        part = (2 * before + piece.num_bytes) * count // max(2 * total, 1)
        if min(part, count - 1) == index:  # at the end of all bytes, a pipe, whose bytes are not known, would be N-th
            mine.append(replace(piece, index=len(mine)))
        before += piece.num_bytes
    return mine


def _sample(pieces: Sequence[Piece], read: ReadOptions) -> Iterator[str]:
    """The beginnings of the first documents of a few pieces spread over the corpus."""
    readable = [piece for piece in pieces if _can_be_read_twice(piece.path)]
    for piece in readable[:: max(len(readable) // SAMPLED_PIECES, 1)][:SAMPLED_PIECES]:
        characters = 0
        for record in islice(read_piece(piece, read), SAMPLED_RECORDS):
            if not isinstance(record, BadRecord) and characters < SAMPLED_CHARACTERS:
                yield from (text[:SAMPLED_CHARACTERS] for text in record.texts)
                characters += sum(map(len, record.texts))


def _paths(pieces: Sequence[Piece]) -> list[Path]:
    """Of every file, once."""
    return list(dict.fromkeys(path for piece in pieces for path in piece.paths))


def _can_be_read_twice(path: Path) -> bool:
    """Standard input and pipes, as the shell's ``<(...)`` makes, give their bytes once."""
    return path != STDIN and path.is_file()


def _deciding(settings: PreprocessSettings, tokenizer: TokenizerFacts, allow_special_tokens: bool) -> dict[str, Any]:
    """What decides the bytes, beside the files."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "allow_special_tokens": allow_special_tokens,
        "append_eod": settings.append_eod,
        "format": [settings.input_format, settings.text_documents],
        "reading": asdict(settings.read),
        "filters": _filters(settings),
    }


def _digest(planned: Sequence[Piece], deciding: Mapping[str, Any]) -> str:
    """Of the whole corpus that parts are cut from: SHA-256 of what decides the bytes and where the cuts are.

    Of a file its name and size: machines may have it below other folders, and a copy of it another time.
    """
    files = [[path.name, size] for path, size in _sizes(planned).items()]
    told = json.dumps({**deciding, "files": files, "pieces": len(planned)}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _identity(
    settings: PreprocessSettings, deciding: Mapping[str, Any], whole: str | None, corpus: Corpus
) -> dict[str, Any]:
    """What decides the bytes, and the cuts; ``whole`` is the corpus that the part is cut from."""
    paths = _paths(corpus.pieces)
    stats = [(str(path), path.stat()) for path in paths if path != STDIN]
    return {
        "is_resumable": all(map(_can_be_read_twice, paths)),
        "inputs": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "pieces": len(corpus.pieces),
        "blocks": [sorted(corpus.cut), corpus.block_bytes],
        **deciding,
        "shard": settings.shard,
        "corpus": whole,
    }


def _filters(settings: PreprocessSettings) -> dict[str, Any]:
    return {**asdict(settings.limits), "deduplicate": settings.deduplicate}


def _sizes(pieces: Sequence[Piece]) -> dict[Path, int]:
    """The files, in their order, with their bytes on disk; 0 of standard input."""
    return {path: 0 if path == STDIN else path.stat().st_size for path in _paths(pieces)}


def _origin(
    settings: PreprocessSettings,
    tokenizer: TokenizerFacts,
    allow_special_tokens: bool,
    whole: str | None,
    pieces: Sequence[Piece],
) -> Origin:
    return Origin(
        tokenizer=tokenizer,
        sources=tuple(SourceFile(path=str(path), size=size) for path, size in _sizes(pieces).items()),
        options={
            "append_eod": settings.append_eod,
            "allow_special_tokens": allow_special_tokens,
            "skip_bad_lines": settings.skip_bad_lines,
            "reading": asdict(settings.read),
            **_filters(settings),
            "provenance": f"{Path(settings.prefix).name}.{META}" if settings.read.keep_meta else None,
            "shard": settings.shard,
            **({} if whole is None else {"corpus": whole}),
        },
        versions=package_versions("numpy", "tokenizers"),
    )


def _check_inputs(settings: PreprocessSettings, pieces: Sequence[Piece]) -> None:
    """Refuse an input that the output would take the place of."""
    written = {path.resolve() for path in final_paths(settings.prefix, settings.names)}
    folder = partial_folder(settings.prefix).resolve()
    for path in _paths(pieces):
        found = path.resolve()
        if found in written or folder in found.parents:
            why = "this is a file of the output, too"
            raise ConfigError([Problem("--input", path, why, "give another --output-prefix, or leave it out")])


def _check_engine(settings: PreprocessSettings, corpus: Corpus) -> None:
    if settings.engine == "ray" and _is_read_here(corpus):
        why = "standard input that is not cut by lines is read by one process, and a worker of the cluster has another"
        raise ConfigError([Problem("--engine", "ray", why, "use --engine local, or give a file")])
