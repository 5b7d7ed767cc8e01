"""``aquila data``: check token files, merge them, build their indices, and say what a run reads."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import tyro

from megatron_aquila.commands.answers import option, prefix_of, run_inspect, run_stats
from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import load_config, with_config_flag
from megatron_aquila.config.sources import sources_read
from megatron_aquila.data.merge import merge
from megatron_aquila.data.progress import lines
from megatron_aquila.data.provenance import document_origin
from megatron_aquila.data.trace import WIDTH, format_piece, samples_of_document, trace_sample
from megatron_aquila.data.verify import verify
from megatron_aquila.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_aquila.train.traced import Traced

USAGE = """usage: aquila data verify (PREFIX... | --config C) [--deep]
                                                   are the files whole, and what their manifests say?
       aquila data inspect PREFIX... [FLAGS]       counts, lengths, documents; --picture FILE draws
       aquila data stats BLEND [FLAGS]             tokens by source and script, epochs under a budget
       aquila data merge OUT IN... [FLAGS]         several data sets into one
       aquila data index CONFIG [FLAGS]            build the indices of a run before it starts
       aquila data trace (--run DIR | --config C [FLAGS])
                         (--step N [--full] | --sample I [--full] | --document D [--prefix P])
                                                   what a step or a sample reads; when a document is read"""
SHOWN = 20  # samples of a document that are listed


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Open each data set; hash its files where it has a manifest. Exit status 1 where anything is wrong."""

    prefixes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, with or without .bin or .idx."""
    config: Path | None = None
    """Instead, the settings of a run: all that it reads to train or to validate on."""
    deep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Look at every token too: the largest is the manifest's, all are in its tokenizer's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Join data sets in the order given, by index arithmetic and a copy of the bytes."""

    output: Annotated[str, tyro.conf.Positional]
    """Prefix to write."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Prefixes to read."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a data set that is there."""
    partial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Some parts of a corpus that was cut, not all: the others are kept apart, or merged later."""


class TraceOptions(TypedDict, total=False):
    """Of ``trace`` only."""

    run: Annotated[Path, option("run", "folder of a run's checkpoints, or one of them, instead of settings")]
    step: Annotated[int, option("step", "what this step reads; the log's first is 1")]
    sample: Annotated[int, option("sample", "what this sample was cut from; the first is 0")]
    document: Annotated[int, option("document", "which steps and samples read this document; the first is 0")]
    prefix: Annotated[str, option("prefix", "data set of --document, or a part of its name")]
    full: Annotated[bool, option("full", f"show texts whole, not {WIDTH} characters of each")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aquila data``; returns its exit status."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["--help" | "-h"]:
            print(USAGE)
            return 0
        case [name, *rest] if name in ACTIONS:
            with exit_code() as code:
                code.value = ACTIONS[name](rest)
            return code.value
    print(USAGE, file=sys.stderr)
    return 2


def run_verify(argv: Sequence[str]) -> int:
    """Print a line a data set, and one for each thing wrong; 1 where there is any.

    Raises ConfigError where none is named: nothing would be wrong.
    """
    options = tyro.cli(VerifyOptions, args=argv, prog="aquila data verify", description=VerifyOptions.__doc__)
    prefixes = list(map(prefix_of, options.prefixes))
    if options.config is not None:
        if prefixes:
            raise ConfigError([Problem("--config", options.config, "prefixes are named too", "give one of the two")])
        prefixes = sources_read(load_config(["--config", str(options.config)], prog="aquila data verify").config.data)
    if len(prefixes) == 0:
        way_out = "give the prefixes of .bin/.idx pairs, or the settings of a run with --config FILE"
        raise ConfigError([Problem("verify", "", "no data set is named", way_out)])
    status = 0
    for prefix in prefixes:
        verdict = verify(prefix, deep=options.deep, lines=True)
        print(f"{'FAILED' if verdict.problems else 'ok':<7}{prefix}: {verdict.found}")
        for problem in verdict.problems:
            status = 1
            print(f"       {problem}")
        if verdict.unchecked is not None:
            print(f"       {verdict.unchecked}")
    return status


def run_merge(argv: Sequence[str]) -> int:
    """Merge and say what came of it."""
    options = tyro.cli(MergeOptions, args=argv, prog="aquila data merge", description=MergeOptions.__doc__)
    inputs = list(map(prefix_of, options.inputs))
    contents = merge(
        inputs, options.output, overwrite=options.overwrite, partial=options.partial, say=_to_stderr
    ).contents
    print(f"wrote {options.output}: {contents.documents:,} documents, {contents.tokens:,} tokens of {contents.dtype}")
    return 0


def run_index(argv: Sequence[str]) -> int:
    """Build what a run of these settings would build, and describe its samples."""
    from megatron_aquila.train.traced import trace_config  # torch: --help answers without

    loaded = load_config(with_config_flag(argv), prog="aquila data index", to_train=True)
    print(trace_config(loaded.config, report=lines(_to_stderr)).source.describe())
    return 0


def run_trace(argv: Sequence[str]) -> int:
    """Print the pieces of a step's samples, of a sample, or the samples of a document."""
    options, opened = _open(argv)
    if "document" in options:
        found = samples_of_document(opened.source, options["document"], prefix=options.get("prefix"))
        print(f"document {options['document']}: in {len(found)} samples of {len(opened.source)}")
        for sample in found[:SHOWN]:
            print(f"  {_place(opened, sample)}")
        if len(found) > SHOWN:
            print(f"  and {len(found) - SHOWN} more, the last in {_place(opened, found[-1])}")
        return 0
    samples = opened.samples_of(options["step"]) if "step" in options else [options["sample"]]
    datasets = {dataset.prefix: dataset for dataset in opened.source.datasets}
    decode = None if opened.tokenizer is None else opened.tokenizer.decode
    width = None if options.get("full", False) else WIDTH
    for sample in samples:
        pieces = trace_sample(opened.source, sample)
        print(f"{_place(opened, sample)}: {len(pieces)} pieces")
        for piece in pieces:
            origin = document_origin(datasets[piece.prefix], piece.document)
            print("  " + format_piece(piece, decode, width=width) + ("" if origin is None else f"\n    from {origin}"))
    return 0


def _place(opened: "Traced", sample: int) -> str:
    step = opened.step_of(sample)
    told = f"step {'unknown' if step is None else step}, sample {sample}"
    return f"{told} (left out, not trained on)" if opened.is_left_out(sample) else told


def _open(argv: Sequence[str]) -> "tuple[Mapping[str, Any], Traced]":
    """The options of ``trace``, and the run that they or the settings name."""
    from megatron_aquila.train.traced import trace_config, trace_run

    loaded = load_config(argv, prog="aquila data trace", options=TraceOptions)
    options: Mapping[str, Any] = loaded.options
    asked = [name for name in ("step", "sample", "document") if name in options]
    if len(asked) != 1:
        given = " ".join(f"--{name}" for name in asked)
        why = "one question at a time" if asked else "nothing is asked"
        raise ConfigError([Problem(given or "trace", "", why, "give one of --step N, --sample I and --document D")])
    if "run" in options:
        beside = [source.removeprefix("flag ") for source in loaded.sources.values() if source != "default"]
        if beside:
            flags = ", ".join(dict.fromkeys(source.partition(":")[0] for source in beside))  # a file without its lines
            why = "the checkpoints of --run say what the run read, settings beside them count for nothing"
            raise ConfigError([Problem(flags, "", why, "give the one or the other")])
        return options, trace_run(options["run"], report=lines(_to_stderr))
    if not loaded.config.data.path:
        why = "no run is named"
        raise ConfigError([Problem("trace", "", why, "give --run FOLDER, or the settings of a run with --config FILE")])
    return options, trace_config(loaded.config, report=lines(_to_stderr))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "verify": run_verify,
    "inspect": run_inspect,
    "stats": run_stats,
    "merge": run_merge,
    "index": run_index,
    "trace": run_trace,
}
