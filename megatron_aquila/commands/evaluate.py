"""``aquila evaluate``: perplexity and accuracy on token files, by source; or tasks of the lm-evaluation-harness."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megatron_aquila.commands.score_report import score_report, task_report
from megatron_aquila.commands.using import ModelOptions, on_ranks, read_source, read_tokenizer, running
from megatron_aquila.errors import Problem, refuse
from megatron_aquila.train.launcher import Launch

if TYPE_CHECKING:
    from megatron_aquila.generate.runner import Runner
    from megatron_aquila.generate.scoring import Score

_TOKENIZER = ("vocab_file", "merge_file", "special_tokens_file", "tokenizer_model")
_NOT_READ = {  # flags of the other way to evaluate: why, what is to be done, which
    "data": (
        ("token files have no tasks", "use it with --tasks", ("task_path", "limit")),
        ("token files hold tokens already", "leave it out: only --tasks reads a tokenizer", _TOKENIZER),
    ),
    "tasks": (("tasks have no windows", "use it with --data", ("by_position", "max_tokens")),),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Score every token of token files once, or run tasks. Processes beyond tp x cp x pp share the token files."""

    data: tuple[str, ...] = ()
    """prefixes of .bin/.idx pairs, or weight prefix weight prefix ... as in training"""
    by_position: int | None = None
    """also show the scores in so many parts of the window: what tokens gain from what stands before them"""
    max_tokens: int | None = None
    """score only so many tokens at the beginning of each data set"""
    batch: int = 4
    """windows, or the harness's texts, at once"""
    json: bool = False
    """print a JSON object instead of a table"""
    tasks: tuple[str, ...] = ()
    """tasks of the lm-evaluation-harness instead of token files; needs the extra lm-eval"""
    task_path: Path | None = None
    """folder of further tasks, YAML files as the harness reads them"""
    limit: int | None = None
    """examples of each task"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(EvaluateOptions, prog="aquila evaluate", description=__doc__, args=argv)

    def work(launch: Launch) -> None:
        check(options)
        run(options, launch)

    return on_ranks(work)


def check(options: EvaluateOptions) -> None:
    """Raise ``ConfigError`` with everything that cannot be meant."""
    problems = []
    if bool(options.data) == bool(options.tasks):
        why = "there is nothing to evaluate on" if not options.data else "tasks are named as well"
        problems.append(Problem("--data", " ".join(options.data), why, "give token files, or --tasks"))
    for flag in ("seq_len", "by_position", "max_tokens", "batch", "limit"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            problems.append(Problem(_flag(flag), value, "it must be positive", "use 1 or more"))
    for way, rules in _NOT_READ.items():
        for why, way_out, names in rules if getattr(options, way) else ():
            given = {name: getattr(options, name) for name in names}
            problems += [Problem(_flag(name), x, why, way_out) for name, x in given.items() if x is not None]
    refuse(problems)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(options: EvaluateOptions, launch: Launch) -> None:
    """Read the model, score, and print on rank 0."""
    source = read_source(options, launch, replicates=bool(options.data))
    if options.data:
        prefixes, weights = _blend(options.data)
        with running(options, source, launch) as runner:
            found = _score(options, runner, prefixes)
        lines = score_report(found, weights, as_json=options.json)
    else:
        tokenizer = read_tokenizer(options, source)
        from megatron_aquila.generate.harness import Answers, run_tasks

        with running(options, source, launch) as runner:
            answers = Answers(runner, tokenizer, batch=options.batch)
            results = run_tasks(answers, options.tasks, folder=options.task_path, limit=options.limit)
            lines = task_report(results, as_json=options.json)
    if launch.rank == 0:
        print("\n".join(lines))


def _blend(words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    from megatron_aquila.data.blend import parse_blend

    return parse_blend(words)


def _score(options: EvaluateOptions, runner: "Runner", prefixes: Sequence[str]) -> "list[Score]":
    from megatron_aquila.data.indexed import IndexedDataset
    from megatron_aquila.generate.scoring import evaluate

    seq_len, num_bins = runner.shape.seq_len, 1 if options.by_position is None else options.by_position
    if num_bins > seq_len:
        refuse([Problem("--by-position", num_bins, f"a window has {seq_len} tokens", "use fewer parts")])
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    return evaluate(
        runner, datasets, seq_len=seq_len, batch=options.batch, max_tokens=options.max_tokens, num_bins=num_bins
    )
