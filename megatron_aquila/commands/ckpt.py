"""``aquila ckpt``: what checkpoints there are, whether they are whole, how they differ, and which of them stay."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.errors import CheckpointError

USAGE = """usage: aquila ckpt list DIR                    the checkpoints of a run
       aquila ckpt show DIR                    what one holds: state, layout, tensors
       aquila ckpt verify DIR... [--all]       is every byte what was written?
       aquila ckpt diff A B                    settings, state and tensors that differ
       aquila ckpt tag DIR NAME                keep one for ever
       aquila ckpt prune DIR --keep K [--every N] [--dry-run]
                                               remove old ones
DIR is a checkpoint, or the folder of a run, whose `latest` is meant."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Read and hash every byte; look for tensors that are not covered, wrong shapes and stray files.

    Exit status 1 where anything is wrong.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Checkpoints, or folders of runs."""
    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of a run's folder, every checkpoint and not only the latest."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Remove checkpoints; the latest, those with a tag and the newest stay."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a run. None should be saving there."""
    keep: int
    """How many of the newest stay, the latest among them."""
    every: int | None = None
    """Steps that are a multiple of this stay."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only say what would go."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aquila ckpt``; returns its exit status."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["--help" | "-h"]:
            print(USAGE)
            return 0
        case [name, *rest] if name in OPTIONED:
            action = OPTIONED[name]
        case [name, *rest] if name in PLAIN and len(rest) == PLAIN[name][0]:
            action = PLAIN[name][1]
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    with exit_code() as code:
        code.value = action(rest)
    return code.value


def run_list(arguments: Sequence[str]) -> int:
    """A line a checkpoint, oldest step first; 1 where one is damaged as far as a glance tells."""
    from rich.console import Console
    from rich.table import Table

    from megatron_aquila.checkpoint.folders import complete_steps, find_checkpoint, step_folder
    from megatron_aquila.checkpoint.integrity import glance
    from megatron_aquila.checkpoint.retention import tags

    root = Path(arguments[0])
    folders = [step_folder(root, step) for step in complete_steps(root)] if root.is_dir() else []
    if not folders:
        folders = [find_checkpoint(root)]  # a single one, or the error that says what is wrong
        root = folders[0].parent
    named, table, status = _latest(root), Table("step", "samples", "size", "saved", "tags", "files"), 0
    for folder in folders:
        problems = glance(folder)
        known = [tag for tag, name in tags(root).items() if name == folder.name]
        marks = ", ".join([*(["latest"] if folder.name == named else []), *known])
        status |= bool(problems)
        figures = ("?", "?", "?") if problems else _figures(folder)
        table.add_row(folder.name.removeprefix("step_"), *figures, marks, "; ".join(problems) or "whole")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return status


def _latest(root: Path) -> str | None:
    from megatron_aquila.checkpoint.folders import LATEST

    pointer = root / LATEST
    return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None


def _figures(folder: Path) -> tuple[str, str, str]:
    """Samples, size and time of a checkpoint that is not damaged."""
    from megatron_aquila.checkpoint.folders import MANIFEST
    from megatron_aquila.checkpoint.manifest import Manifest

    manifest = Manifest.read(folder / MANIFEST)
    train = manifest.state.get("train")
    samples = train.get("consumed_samples") if isinstance(train, dict) else None
    return "" if samples is None else f"{samples:,}", f"{manifest.num_bytes:,}", manifest.saved_text


def run_show(arguments: Sequence[str]) -> int:
    """The table of contents. Reads only the manifest."""
    from rich.console import Console

    from megatron_aquila.commands.convert import inspect

    inspect(Path(arguments[0]), Console(width=None if sys.stdout.isatty() else 160))
    return 0


def run_verify(arguments: Sequence[str]) -> int:
    """A line a checkpoint, and one for each thing wrong; 1 where there is any."""
    from megatron_aquila.checkpoint.folders import complete_steps, find_checkpoint, step_folder
    from megatron_aquila.checkpoint.integrity import examine

    options = tyro.cli(VerifyOptions, args=arguments, prog="aquila ckpt verify", description=VerifyOptions.__doc__)
    status = 0
    for path in options.folders:
        steps = complete_steps(path) if options.all and path.is_dir() else []
        for folder in [step_folder(path, step) for step in steps] or [find_checkpoint(path)]:
            problems = examine(folder)
            print(f"{'FAILED' if problems else 'ok':<7}{folder}")
            for problem in problems:
                status = 1
                print(f"       {problem}")
    return status


def run_diff(arguments: Sequence[str]) -> int:
    """A line for each entry of the state and each tensor that differs; 1 where any does."""
    from megatron_aquila.checkpoint.difference import state_differences, tensor_differences
    from megatron_aquila.checkpoint.store import CheckpointReader

    first, second = (CheckpointReader(Path(argument)) for argument in arguments)
    status = 0
    for line in (*state_differences(first, second), *tensor_differences(first, second)):
        status = 1
        print(line)
    if status == 0:
        print(f"{first.folder} and {second.folder} hold the same, bit for bit")
    return status


def run_tag(arguments: Sequence[str]) -> int:
    """Give a checkpoint a name that keeps it from being removed."""
    from megatron_aquila.checkpoint.retention import add_tag

    folder = add_tag(Path(arguments[0]), arguments[1])
    print(f"{folder}: tagged {arguments[1]}, and kept until {folder.parent / 'tags' / arguments[1]} is removed")
    return 0


def run_prune(arguments: Sequence[str]) -> int:
    """Say what goes, and remove it; leftovers of killed saves are for the run itself to remove."""
    from megatron_aquila.checkpoint.retention import prune, superfluous

    options = tyro.cli(PruneOptions, args=arguments, prog="aquila ckpt prune", description=PruneOptions.__doc__)
    if options.keep < 1 or (options.every is not None and options.every < 1):
        raise CheckpointError(f"--keep {options.keep} --every {options.every}: give 1 or more; the latest always stays")
    if not options.folder.is_dir():
        raise CheckpointError(f"{options.folder}: there is no such folder; name the folder of a run")
    if options.dry_run:
        removed = superfluous(options.folder, options.keep, every=options.every)
    else:
        removed = prune(options.folder, options.keep, every=options.every, leftovers=False)
    for folder in removed:
        print(f"{'would remove' if options.dry_run else 'removed'} {folder}")
    print(f"{len(removed)} checkpoints")
    return 0


OPTIONED: dict[str, Callable[[Sequence[str]], int]] = {"verify": run_verify, "prune": run_prune}
PLAIN: dict[str, tuple[int, Callable[[Sequence[str]], int]]] = {  # with the number of their arguments
    "list": (1, run_list),
    "show": (1, run_show),
    "diff": (2, run_diff),
    "tag": (2, run_tag),
}
