"""``aquila tokenizer``: train one, compare several, and extend one by another."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.data.readers import read_texts
from megatron_aquila.data.tokenizer import Tokenizer, tokenizer_at
from megatron_aquila.data.tokenizer_comparison import compare, draw_comparison
from megatron_aquila.data.tokenizer_extension import extend, save_tokenizer
from megatron_aquila.data.tokenizer_training import measure_density, save_tokenizer_files, train_tokenizer
from megatron_aquila.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a tokenizer; write vocab.json, merges.txt, special_tokens.txt, tokenizer.json and its settings."""

    input: tuple[Path, ...]
    """Files of one JSON object a line."""
    vocab_size: int
    """Ids of the tokenizer, special tokens included."""
    output: Path
    """Folder to write."""
    json_key: str = "text"
    """Key of the text."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Mean tokens a document, bytes a token, coverage, unknown tokens, and texts that come back exactly."""

    tokenizers: tyro.conf.Positional[tuple[str, ...]]
    """folders or files of tokenizers, each as PATH or NAME=PATH"""
    input: tuple[Path, ...]
    """corpora, a file each: zh.jsonl en.jsonl code.jsonl"""
    json_key: str = "text"
    """key of the text"""
    limit: int | None = None
    """read only so many documents of each"""
    format: Literal["text", "markdown"] = "text"
    """of the table"""
    plot: Path | None = None
    """also draw bars of the mean tokens a document: .png or .svg; needs matplotlib"""


@dataclass(frozen=True, kw_only=True)
class ExtendOptions:
    """Put another tokenizer's pieces behind a tokenizer's own, whose ids stay."""

    base: tyro.conf.Positional[Path]
    """the tokenizer that keeps its ids"""
    add: Path
    """the tokenizer whose pieces are added where they are not there"""
    output: Path
    """folder to write"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.extras.subcommand_cli_from_dict(
        {"train": TrainOptions, "compare": CompareOptions, "extend": ExtendOptions},
        args=argv,
        prog="aquila tokenizer",
        description=__doc__,
    )
    with exit_code() as code:
        if isinstance(options, TrainOptions):
            run(options)
        elif isinstance(options, CompareOptions):
            run_compare(options)
        else:
            run_extend(options)
    return code.value


def run(options: TrainOptions) -> None:
    """Train, save, and print the mean tokens per document of each input, as Aquila's model card does."""
    texts = (text for path in options.input for text in read_texts(path, options.json_key))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    save_tokenizer_files(tokenizer, options.output)
    print(f"{tokenizer.vocab_size:,} tokens, in {options.output}")
    print(f"{'file':<24}{'documents':>12}{'tokens/document':>17}{'bytes/token':>13}")
    for path in options.input:
        density = measure_density(tokenizer, read_texts(path, options.json_key))
        row = f"{density.documents:>12,}{density.mean_tokens:>17.1f}{density.bytes_per_token:>13.2f}"
        print(f"{path.name:<24}{row}")


def run_compare(options: CompareOptions) -> None:
    """Print the table, and draw it where a picture is wanted."""
    named: dict[str, Tokenizer] = {}
    for word in options.tokenizers:
        name, equals, path = word.rpartition("=")
        name = name if equals else Path(path).name
        if name in named:
            raise DataError(f"{word}: another tokenizer is named {name} too; give NAME=PATH")
        named[name] = tokenizer_at(Path(path))
    texts = {path.stem: list(islice(read_texts(path, options.json_key), options.limit)) for path in options.input}
    found = compare(named, texts)
    print(found.markdown() if options.format == "markdown" else found.text())
    if options.plot is not None:
        draw_comparison(found, options.plot)
        print(f"drawn: {options.plot}")


def run_extend(options: ExtendOptions) -> None:
    """Merge, save, and say how many ids came."""
    base = tokenizer_at(options.base)
    found = extend(base, tokenizer_at(options.add))
    save_tokenizer(found, options.output)
    print(f"{base.vocab_size:,} + {found.vocab_size - base.vocab_size:,} = {found.vocab_size:,} in {options.output}")
