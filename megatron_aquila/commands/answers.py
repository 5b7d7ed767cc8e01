"""``aquila data inspect`` and ``stats``: what data sets hold, and how often a run reads them."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.schema import DataConfig
from megatron_aquila.config.sources import number, sources, split_of, training_blends
from megatron_aquila.data.blend import open_library, shares_of
from megatron_aquila.data.course import Phase, expected_readings, legs_of
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.inspect import (
    SHOWN_TOKENS,
    excerpt,
    pick_documents,
    read_scripts,
    source_stats,
    summarize,
)
from megatron_aquila.data.manifest import check_fingerprint
from megatron_aquila.data.provenance import document_origin
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.observe.plot import plot_lengths

PICTURES = (".png", ".svg", ".pdf")
SAMPLES = LONGEST = 5
ENDINGS = (".bin", ".idx", ".manifest.json")


def option(name: str, help: str) -> Any:
    """A flag of a command's own beside the settings."""
    return tyro.conf.arg(name=name, help=help, help_behavior_hint="")


class InspectOptions(TypedDict, total=False):
    """Of ``inspect`` only."""

    samples: Annotated[int, option("samples", f"documents of each set that are shown, drawn by --seed; {SAMPLES}")]
    longest: Annotated[int, option("longest", f"how many of the longest documents are named; {LONGEST}")]
    document: Annotated[int, option("document", "show this document instead; the first is 0")]
    full: Annotated[bool, option("full", f"show documents whole, not their first {SHOWN_TOKENS} tokens")]
    picture: Annotated[Path, option("picture", "draw the lengths of documents into a .png, .svg or .pdf")]


class StatsOptions(TypedDict, total=False):
    """Of ``stats`` only."""

    tokens: Annotated[int, option("tokens", "tokens that are read, instead of --train-samples")]


def prefix_of(path: str) -> str:
    """The prefix that a path names, which may be that of one of its files.

    A data set of this very name comes first, as of a prefix that ends in ``.bin`` itself.
    """
    ending = next((each for each in ENDINGS if path.endswith(each)), "")
    return path if Path(f"{path}.idx").exists() else path.removesuffix(ending)


def run_inspect(argv: Sequence[str]) -> int:
    """Print counts, lengths and documents of each set, and draw a picture where one is asked for."""
    loaded = load_config(with_data_flag(argv), prog="aquila data inspect", options=InspectOptions)
    options, config = loaded.options, loaded.config
    picture = options.get("picture")
    if problems := list(_problems(options)):
        raise ConfigError(problems)
    prefixes = sources(*(path for _, path in _blends(config.data)))
    tokenizer = _tokenizer(config.data, prefixes)
    drawn = {}
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        summary = summarize(dataset, longest=options.get("longest", LONGEST))
        print("\n".join(summary.lines()))
        picked = pick_documents(dataset, options.get("samples", SAMPLES), seed=config.seed)
        for document in [options["document"]] if "document" in options else picked:
            _show(dataset, document, tokenizer, tokens=None if options.get("full", False) else SHOWN_TOKENS)
        drawn[prefix] = [astuple(found) for found in summary.bins]
    if picture is not None:
        plot_lengths(drawn, picture, title="lengths of documents")
        print(f"wrote {picture}")
    return 0


def run_stats(argv: Sequence[str]) -> int:
    """Print tokens, epochs and scripts of each set under the blend and the budget of the settings."""
    loaded = load_config(with_data_flag(argv), prog="aquila data stats", options=StatsOptions)
    config = loaded.config
    phases = [Phase(start=start, paths=tuple(path)) for start, path in _blends(config.data)]
    samples = config.train.train_samples
    if "tokens" in loaded.options:
        samples = -(-loaded.options["tokens"] // config.model.seq_len)
    if samples < 1:
        raise ConfigError([Problem("--tokens", loaded.options["tokens"], "nothing is read", "use 1 or more")])
    library = open_library(phases[0].paths, seq_len=config.model.seq_len, seed=config.seed, cache_path=None)
    train, _, _ = shares_of(split_of(config.data))
    assert train is not None, f"--split {config.data.split} leaves nothing to train on"
    readings = expected_readings(library, legs_of(phases, [samples]), train)
    stats = source_stats(readings, library, _tokenizer(config.data, list(readings)))
    total = sum(each.read_tokens for each in stats)
    print(f"{samples:,} samples of {config.model.seq_len:,} tokens, {total:,.0f} tokens, are read of {len(stats)} sets")
    for each in stats:
        share, held = each.read_tokens / total, f"{each.documents:,} documents, {each.tokens:,} tokens"
        print(f"  {each.prefix}: {held}; {share:.2%} of what is read, {each.epochs:,.2f} epochs")
        if each.scripts is not None:
            print(f"    {_shares(each.scripts, each.tokens)}")
    if scripts := read_scripts(stats):
        print(f"of what is read: {_shares(scripts, total)}")
    return 0


def with_data_flag(argv: Sequence[str]) -> list[str]:
    """``argv`` with ``--data-path`` before the words that it begins with, endings of files off."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    named = [word if number(word) is not None else prefix_of(word) for word in words]
    return [*(["--data-path"] if named else []), *named, *argv[len(words) :]]


def _problems(options: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the flags of ``inspect``."""
    for name in ("samples", "longest"):
        if options.get(name, 0) < 0:
            yield Problem(f"--{name}", options[name], "no documents are so few", "use 0 or more")
    picture = options.get("picture")
    if picture is not None and picture.suffix not in PICTURES:
        way_out = f"end it in {', '.join(PICTURES)}"
        yield Problem("--picture", picture, "the end of its name does not say what to draw", way_out)
    if picture is not None and not picture.parent.is_dir():
        yield Problem("--picture", picture, f"{picture.parent} is no folder", "make it, or choose another")


def _blends(data: DataConfig) -> list[tuple[int, tuple[str, ...]]]:
    blends = training_blends(data)
    if not blends[0][1]:
        way_out = "give prefixes, or weight prefix pairs, or the settings of a run with --config FILE"
        raise ConfigError([Problem("--data-path", "", "no data set is named", way_out)])
    return blends


def _tokenizer(data: DataConfig, prefixes: Sequence[str]) -> Tokenizer | None:
    """The tokenizer that the settings name, where they do; it must be the one that made the sets."""
    if data.vocab_file is None and data.tokenizer_model is None:
        print("no tokenizer is named: ids are shown, not texts", file=sys.stderr)
        return None
    tokenizer = load_tokenizer(
        data.tokenizer_type,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        special_tokens_file=data.special_tokens_file,
        tokenizer_model=data.tokenizer_model,
    )
    check_fingerprint(prefixes, fingerprint(tokenizer))
    return tokenizer


def _show(dataset: IndexedDataset, document: int, tokenizer: Tokenizer | None, *, tokens: int | None) -> None:
    found, origin = excerpt(dataset, document, tokenizer, tokens=tokens), document_origin(dataset, document)
    whence = "" if origin is None else f", from {origin}"
    cut = "" if found.shown_tokens == found.num_tokens else f", the first {found.shown_tokens}"
    print(f"document {document}: {found.num_tokens:,} tokens{cut}{whence}\n  {found.text}")


def _shares(scripts: dict[str, float], tokens: float) -> str:
    return ", ".join(f"{name} {share:.1%} ({share * tokens:,.0f})" for name, share in scripts.items())
