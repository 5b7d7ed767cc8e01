"""``aquila evaluate``: perplexity and accuracy on token files, by source; or tasks of the lm-evaluation-harness."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.commands.pretrain import leave
from megatron_aquila.commands.using import ModelOptions, read_source, read_tokenizer, running
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.train.launcher import Launch, read_launch

if TYPE_CHECKING:
    from megatron_aquila.generate.runner import Runner
    from megatron_aquila.generate.scoring import Score


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Score every token of token files once, or run tasks. Processes beyond tp x pp share the token files."""

    data: tuple[str, ...] = ()
    """prefixes of .bin/.idx pairs, or weight prefix weight prefix ... as in training"""
    seq_len: int | None = None
    """tokens of a window; default the model's longest sequence"""
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
    launch = read_launch()
    with exit_code(rank=launch.rank) as code:
        check(options)
        run(options, launch)
    if code.value != 0 and launch.world_size > 1:
        leave(code.value)
    return code.value


def check(options: EvaluateOptions) -> None:
    """Raise ``ConfigError`` with everything that cannot be meant."""
    problems = []
    if bool(options.data) == bool(options.tasks):
        why = "there is nothing to evaluate on" if not options.data else "tasks are named as well"
        problems.append(Problem("--data", " ".join(options.data), why, "give token files, or --tasks"))
    for flag in ("seq_len", "max_tokens", "batch", "limit"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            problems.append(Problem(f"--{flag.replace('_', '-')}", value, "it must be positive", "use 1 or more"))
    if problems:
        error = ConfigError(problems)
        error.is_shared = True
        raise error


def run(options: EvaluateOptions, launch: Launch) -> None:
    """Read the model, score, and print on rank 0."""
    source = read_source(options, launch, replicates=bool(options.data))
    if options.data:
        prefixes, weights = _blend(options.data)
        with running(options, source, launch) as runner:
            found = _score(options, runner, prefixes)
            lines = _report(options, found, weights)
    else:
        tokenizer = read_tokenizer(options, source)
        from megatron_aquila.generate.harness import Answers, run_tasks

        with running(options, source, launch) as runner:
            answers = Answers(runner, tokenizer, batch=options.batch)
            results = run_tasks(answers, options.tasks, folder=options.task_path, limit=options.limit)
            lines = _task_report(results, as_json=options.json)
    if launch.rank == 0:
        print("\n".join(lines))


def _blend(words: Sequence[str]) -> tuple[list[str], list[float]]:
    from megatron_aquila.data.blend import parse_blend

    prefixes, weights = parse_blend(words)
    return prefixes, [1.0] * len(prefixes) if weights is None else weights


def _score(options: EvaluateOptions, runner: "Runner", prefixes: Sequence[str]) -> "list[Score]":
    from megatron_aquila.data.indexed import IndexedDataset
    from megatron_aquila.generate.scoring import evaluate

    seq_len = runner.shape.seq_len if options.seq_len is None else options.seq_len
    if seq_len > runner.shape.seq_len:
        why = f"the model's longest sequence is {runner.shape.seq_len}"
        error = ConfigError([Problem("--seq-len", seq_len, why, "leave it out, or use a shorter one")])
        error.is_shared = True
        raise error
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    return evaluate(runner, datasets, seq_len=seq_len, batch=options.batch, max_tokens=options.max_tokens)


def _report(options: EvaluateOptions, found: "Sequence[Score]", weights: Sequence[float]) -> list[str]:
    """A row a source; then the mean over all tokens, or by the weights where they are given."""
    shares = [weight / sum(weights) for weight in weights]
    is_weighted = len(options.data) > len(found)
    if not is_weighted:
        total = sum(score.num_tokens for score in found)
        shares = [score.num_tokens / total for score in found]
    loss = sum(share * score.loss for share, score in zip(shares, found, strict=True))
    accuracy = sum(share * score.accuracy for share, score in zip(shares, found, strict=True))
    whole = "all, by weight" if is_weighted else "all"
    named = [(score.name, score.num_tokens, score.loss, score.accuracy) for score in found]
    named.append((whole, sum(score.num_tokens for score in found), loss, accuracy))
    rows = [
        {"source": name, "tokens": tokens, "loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}
        for name, tokens, loss, accuracy in named
    ]
    if options.json:
        *sources, total_row = rows
        return [json.dumps({"sources": sources, "total": total_row}, ensure_ascii=False)]
    width = max(len(str(row["source"])) for row in rows)
    head = f"{'source':<{width}}{'tokens':>16}{'loss':>10}{'perplexity':>14}{'accuracy':>10}"
    return [head] + [
        f"{name:<{width}}{tokens:>16,}{loss:>10.4f}{math.exp(loss):>14.3f}{accuracy:>10.2%}"
        for name, tokens, loss, accuracy in named
    ]


def _task_report(results: dict[str, Any], *, as_json: bool) -> list[str]:
    numbers = {
        task: {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in results.items()
    }
    if as_json:
        return [json.dumps({"tasks": numbers}, ensure_ascii=False)]
    return [f"{task}  {name}  {value:.4f}" for task, figures in numbers.items() for name, value in figures.items()]
