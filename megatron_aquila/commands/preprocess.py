"""``aquila preprocess``: text to the .bin/.idx files a run trains on. Megatron-LM's and FlagScale's flags."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.data.indexed import token_dtype
from megatron_aquila.data.preprocess import Progress, document_prefixes, preprocess
from megatron_aquila.data.temporary import remove_leftovers
from megatron_aquila.data.tokenizer import Tokenizer, TokenizerType, load_tokenizer
from megatron_aquila.errors import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Tokenize JSON lines into PREFIX_KEY_document.bin and .idx, which Megatron-LM reads too.

    PREFIX_KEY_document.manifest.json beside them says what they must be and what made them.
    """

    input: tuple[Path, ...]
    """Files of one JSON object a line; a name that ends in .gz is unpacked on the way."""
    output_prefix: str
    """Path and first part of the name of the files to write; the folder is made where there is none."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the texts; each makes a data set."""
    tokenizer_type: TokenizerType = "AquilaTokenizer"
    """AquilaTokenizer takes vocabulary, merges and special tokens, HuggingFaceTokenizer a tokenizer.json."""
    vocab_file: Path | None = None
    """vocab.json."""
    merge_file: Path | None = None
    """merges.txt."""
    special_tokens_file: Path | None = None
    """special_tokens.txt."""
    tokenizer_model: Path | None = None
    """tokenizer.json, or its folder."""
    append_eod: bool = False
    """End each document with the end-of-document token; an empty one stays empty."""
    allow_special_tokens: bool = False
    """Let special tokens in the text count as such, as Megatron-LM does: a document can then end itself."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenize; default one a core. The output does not depend on it."""
    on_bad_line: Literal["stop", "skip"] = "stop"
    """What to do with a line that is no document, a blank one too: stop there, or leave it out and count it."""
    log_interval: int = 100_000
    """Documents between lines of progress where the output is not a terminal; 1 or more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(PreprocessOptions, args=argv, prog="aquila preprocess", description=PreprocessOptions.__doc__)
    with exit_code() as code:
        run(options)
    return code.value


def run(options: PreprocessOptions) -> None:
    """Tokenize and say what was done.

    Raises as ``data.preprocess.preprocess`` and ``load_tokenizer`` do; ConfigError where ``log_interval`` is below 1.
    """
    if options.log_interval < 1:
        why = "progress is shown every so many documents"
        raise ConfigError([Problem("--log-interval", options.log_interval, why, "use 1 or more")])
    tokenizer = load_tokenizer(
        options.tokenizer_type,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        special_tokens_file=options.special_tokens_file,
        tokenizer_model=options.tokenizer_model,
        allow_special_tokens=options.allow_special_tokens,
    )
    _remove_leftovers(options)
    started = time.perf_counter()
    with _shown(options) as report:
        done = preprocess(
            options.input,
            options.output_prefix,
            tokenizer=tokenizer,
            keys=options.json_keys,
            append_eod=options.append_eod,
            workers=options.workers,
            skip_bad_lines=options.on_bad_line == "skip",
            report=report,
        )
    for bad in done.named_bad_lines:
        print(f"skipped {bad}", file=sys.stderr)
    print(_summary(options, tokenizer, done, time.perf_counter() - started))


def _remove_leftovers(options: PreprocessOptions) -> None:
    prefixes = document_prefixes(options.output_prefix, options.json_keys)
    removed = [path.name for prefix in prefixes for path in remove_leftovers(prefix)]
    if removed:
        print(f"removed what a dead process left: {', '.join(removed)}", file=sys.stderr)


@contextmanager
def _shown(options: PreprocessOptions) -> Iterator[Callable[[Progress], None]]:
    """A bar in a terminal, else a line every ``log_interval`` documents."""
    console = Console()
    sizes = {path: path.stat().st_size for path in options.input if path.exists()}
    started = time.perf_counter()
    if not console.is_terminal:
        shown = 0

        def report(done: Progress) -> None:
            nonlocal shown
            if done.documents // options.log_interval > shown:
                shown = done.documents // options.log_interval
                print(_rate(done, time.perf_counter() - started), flush=True)

        yield report
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=sum(sizes.values()))

        def move(done: Progress) -> None:
            before = sum(sizes[path] for path in options.input[: options.input.index(done.path)])
            described = _rate(done, time.perf_counter() - started)
            bar.update(task, completed=before + done.position, description=described)

        yield move


def _rate(done: Progress, seconds: float) -> str:
    megabytes = done.num_bytes / 1e6
    return (
        f"{done.documents:,} documents, {done.tokens / 1e6:,.1f} M tokens, {megabytes:,.1f} MB "
        f"({megabytes / seconds:,.1f} MB/s)"
    )


def _summary(options: PreprocessOptions, tokenizer: Tokenizer, done: Progress, seconds: float) -> str:
    skipped = f"; {done.bad_lines:,} bad lines skipped" if done.bad_lines > 0 else ""
    prefixes = document_prefixes(options.output_prefix, options.json_keys)
    files = ", ".join(f"{prefix}.bin/.idx/.manifest.json" for prefix in prefixes)
    return f"{_rate(done, seconds)} in {seconds:.1f} s{skipped}\nwrote {files} ({token_dtype(tokenizer.vocab_size)})"
