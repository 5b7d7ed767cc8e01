"""``aquila preprocess``: text to the .bin/.idx files a run trains on. Megatron-LM's and FlagScale's flags."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Literal

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.commands.flag_types import NO_WORDS, OptionalNumber, OptionalPath, OptionalText, Words, WordTuple
from megatron_aquila.commands.megatron_preprocess import without_megatrons
from megatron_aquila.data.encoders import Backend
from megatron_aquila.data.filters import LengthLimits
from megatron_aquila.data.inputs import InputFormat, TextDocuments
from megatron_aquila.data.output import document_prefix
from megatron_aquila.data.preprocess import Done, Progress, preprocess
from megatron_aquila.data.preprocess_settings import Engine, PreprocessSettings
from megatron_aquila.data.records import MAX_DOCUMENT_BYTES, ReadOptions, parse_template
from megatron_aquila.data.tokenizer import Tokenizer, TokenizerType, load_tokenizer
from megatron_aquila.data.workers import kept_for_good
from megatron_aquila.errors import ConfigError, DataError, Problem

TEXT: Final = WordTuple(["text"])


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Tokenize a corpus into PREFIX_KEY_document.bin and .idx, which Megatron-LM reads too.

    PREFIX_KEY_document.manifest.json beside them says what they hold and what made them. A run that was stopped goes on
    where it was when the same command is given again.
    """

    input: Words
    """Files, globs, folders or - (standard input): JSON lines, JSON arrays, parquet or text, plain, .gz or .zst."""
    output_prefix: str
    """Path and first part of the name of the files to write; the folder is made where there is none."""
    input_format: InputFormat = "auto"
    """What the inputs hold; auto goes by the end of their names."""
    text_documents: TextDocuments = "file"
    """Of plain text, what a document is: the file, a line, or what lies between blank lines."""
    json_keys: Words = TEXT
    """Keys of the texts; each makes a data set."""
    text_template: OptionalText = None
    r"""Instead of the keys, one text of several fields: '{title}\n{content}'."""
    keep_meta: Words = NO_WORDS
    """Fields that go along into PREFIX.meta.jsonl, a line for each document with its file and line."""
    min_chars: OptionalNumber = None
    """Leave out documents of fewer characters, the texts of all keys together."""
    max_chars: OptionalNumber = None
    """Leave out documents of more characters."""
    deduplicate: bool = False
    """Of documents with equal texts, anywhere in the inputs, keep the first; with --shard, within each part."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A longer record counts as a bad line and is not held in memory."""
    tokenizer_type: TokenizerType = "AquilaTokenizer"
    """AquilaTokenizer takes vocabulary, merges and special tokens, HuggingFaceTokenizer a tokenizer.json."""
    vocab_file: OptionalPath = None
    """vocab.json."""
    merge_file: OptionalPath = None
    """merges.txt."""
    special_tokens_file: OptionalPath = None
    """special_tokens.txt."""
    tokenizer_model: OptionalPath = None
    """tokenizer.json, or its folder."""
    tokenizer_backend: Backend = "auto"
    """auto takes gigatoken where it is installed and gives the same ids as tokenizers on a sample of the input."""
    append_eod: bool = False
    """End each document with the end-of-document token; an empty one stays empty."""
    allow_special_tokens: bool = False
    """Let special tokens in the text count as such, as Megatron-LM does: a document can then end itself."""
    workers: int = field(default_factory=lambda: usable_cores())
    """Processes that tokenize; default one a core. The output does not depend on it."""
    engine: Engine = "local"
    """local: processes of this machine; ray: the Ray cluster of RAY_ADDRESS, which shares the disk of the output."""
    shard: OptionalText = None
    """I/N: only part I (from 0) of N of the corpus, into PREFIX_shardIofN, for an array of jobs."""
    overwrite: bool = False
    """Replace data sets of this prefix when the new ones are whole."""
    on_bad_line: Literal["stop", "skip"] = "stop"
    """What to do with a line that is no document: stop there, or leave it out and name it in PREFIX.bad.jsonl."""
    log_interval: int = 100_000
    """Documents between lines of progress where the output is not a terminal; 1 or more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    with exit_code() as code:
        words = without_megatrons(sys.argv[1:] if argv is None else argv)
        run(tyro.cli(PreprocessOptions, args=words, prog="aquila preprocess", description=PreprocessOptions.__doc__))
    return code.value


def run(options: PreprocessOptions) -> None:
    """Tokenize and say what was done.

    Raises as ``data.preprocess.preprocess`` and ``load_tokenizer`` do; ConfigError where ``log_interval`` is below 1 or
    ``shard`` is not two numbers.
    """
    if options.log_interval < 1:
        why = "progress is shown every so many documents"
        raise ConfigError([Problem("--log-interval", options.log_interval, why, "use 1 or more")])
    settings = settings_of(options)
    with kept_for_good():
        tokenizer = tokenizer_of(options)
    try:
        with _shown(options) as report:
            done = preprocess(settings, tokenizer, report=report, say=lambda line: print(line, file=sys.stderr))
    except BrokenPipeError as error:
        why = "standard output was closed; what was finished is kept, and the same command goes on from there"
        raise DataError(why) from error
    print(_summary(settings, done))


def tokenizer_of(options: PreprocessOptions) -> Tokenizer:
    """The tokenizer that the flags name."""
    return load_tokenizer(
        options.tokenizer_type,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        special_tokens_file=options.special_tokens_file,
        tokenizer_model=options.tokenizer_model,
        allow_special_tokens=options.allow_special_tokens,
    )


def settings_of(options: PreprocessOptions) -> PreprocessSettings:
    """The flags as the library takes them."""
    template = None if options.text_template is None else parse_template(options.text_template)
    return PreprocessSettings(
        inputs=tuple(options.input),
        output_prefix=options.output_prefix,
        read=ReadOptions(
            keys=tuple(options.json_keys),
            template=template,
            keep_meta=tuple(options.keep_meta),
            max_document_bytes=options.max_document_bytes,
        ),
        input_format=options.input_format,
        text_documents=options.text_documents,
        append_eod=options.append_eod,
        skip_bad_lines=options.on_bad_line == "skip",
        limits=LengthLimits(min_chars=options.min_chars, max_chars=options.max_chars),
        deduplicate=options.deduplicate,
        backend=options.tokenizer_backend,
        workers=options.workers,
        engine=options.engine,
        shard=None if options.shard is None else _shard(options.shard),
        overwrite=options.overwrite,
    )


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError([Problem("--shard", text, "it is the number of a part and how many there are", "use I/N")])
    return int(index), int(count)


@contextmanager
def _shown(options: PreprocessOptions) -> Iterator[Callable[[Progress], None]]:
    """A bar in a terminal, else a line every ``log_interval`` documents."""
    if not sys.stdout.isatty():
        shown = 0

        def report(done: Progress) -> None:
            nonlocal shown
            if (done.counts.documents - done.resumed.documents) // options.log_interval > shown:
                shown = (done.counts.documents - done.resumed.documents) // options.log_interval
                print(progress_line(done), flush=True)

        yield report
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn  # only a terminal waits for its import
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def move(done: Progress) -> None:
            bar.update(task, total=done.total_file_bytes, completed=done.file_bytes, description=progress_line(done))

        yield move


def progress_line(done: Progress) -> str:
    """What is done, how fast, and how long the rest takes at that speed."""
    left = done.seconds_left
    return _rate(done) if left is None else f"{_rate(done)}, {timedelta(seconds=round(left))} left"


def _rate(done: Progress) -> str:
    counts, speed = done.counts, done.bytes_per_second / 1e6
    amounts = f"{counts.documents:,} documents, {counts.tokens / 1e6:,.1f} M tokens, {counts.num_bytes / 1e6:,.1f} MB"
    return f"{amounts} ({speed:,.1f} MB/s)"


def usable_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _summary(settings: PreprocessSettings, done: Done) -> str:
    counts = done.progress.counts
    bad, dropped = counts.bad_records, [f"{n:,} {reason}" for reason, n in counts.dropped().items() if n > 0]
    skipped = f"; {bad:,} bad lines skipped, named in {settings.prefix}.bad.jsonl" if bad > 0 else ""
    left_out = f"; documents left out: {', '.join(dropped)}" if dropped else ""
    dtype = next(iter(done.manifests.values())).contents.dtype
    meta = f", {settings.prefix}.meta.jsonl" if settings.read.keep_meta else ""
    files = ", ".join(f"{prefix}.bin/.idx/.manifest.json" for prefix in done.manifests)
    told = f"{_rate(done.progress)} in {done.progress.seconds:.1f} s{skipped}{left_out}\nwrote {files}{meta} ({dtype})"
    return "\n".join([told, *(f"when all parts are there: {line}" for line in merging(settings))])


def merging(settings: PreprocessSettings) -> list[str]:
    """The command that joins the parts of each key; none where there are no parts. Names sort as parts are numbered."""
    if settings.shard is None:
        return []
    whole, parts = shlex.quote(settings.output_prefix), shlex.quote(f"{settings.output_prefix}_shard")
    parts += f"?????of{settings.shard[1]:05d}"
    return [
        f"aquila data merge {document_prefix(whole, name)} {document_prefix(parts, name)}.idx"
        for name in map(shlex.quote, settings.names)
    ]
