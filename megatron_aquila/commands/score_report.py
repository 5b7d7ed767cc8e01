"""Scores as ``aquila evaluate`` prints them: a table, or a JSON object."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_aquila.generate.scoring import Score

Row = dict[str, Any]


def score_report(found: "Sequence[Score]", weights: Sequence[float] | None, *, as_json: bool) -> list[str]:
    """A row a source, then the mean over all tokens, or by ``weights``; and that mean by position, if it was asked for.

    The JSON object has every source by position.
    """
    total = mean_row("all" if weights is None else "all, by weight", found, weights)
    rows = [_row(score) for score in found]
    by_bin = zip(*(score.by_position for score in found), strict=True)
    bins = [mean_row(parts[0].name, parts, weights) for parts in by_bin if any(part.num_tokens for part in parts)]
    has_bins = len(found[0].by_position) > 1
    if as_json:
        if has_bins:
            for row, score in zip(rows, found, strict=True):
                row["by_position"] = [_place(_row(part)) for part in score.by_position if part.num_tokens > 0]
            total["by_position"] = [_place(row) for row in bins]
        return [json.dumps({"sources": rows, "total": total}, ensure_ascii=False)]
    return _table("source", [*rows, total]) + (["", *_table("positions", bins)] if has_bins else [])


def mean_row(name: str, scores: "Sequence[Score]", weights: Sequence[float] | None) -> Row:
    """The mean over the tokens of all ``scores``, or of those that have tokens by ``weights``."""
    given = [float(score.num_tokens) for score in scores] if weights is None else weights
    counted = [(weight, score) for weight, score in zip(given, scores, strict=True) if score.num_tokens > 0]
    whole = sum(weight for weight, _ in counted)
    tokens = sum(score.num_tokens for score in scores)
    if whole == 0:
        return _figures(name, tokens, math.nan, math.nan)
    loss = sum(weight * score.loss for weight, score in counted) / whole
    return _figures(name, tokens, loss, sum(weight * score.accuracy for weight, score in counted) / whole)


def task_report(results: Mapping[str, Any], *, as_json: bool) -> list[str]:
    """A line for each figure of each task."""
    numbers = {
        task: {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in results.items()
    }
    if as_json:
        return [json.dumps({"tasks": numbers}, ensure_ascii=False)]
    return [f"{task}  {name}  {value:.4f}" for task, figures in numbers.items() for name, value in figures.items()]


def _row(score: "Score") -> Row:
    return _figures(score.name, score.num_tokens, score.loss, score.accuracy)


def _figures(name: str, tokens: int, loss: float, accuracy: float) -> Row:
    return {"source": name, "tokens": tokens, "loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}


def _place(row: Row) -> Row:
    """The row of a bin: its first and last position instead of a name."""
    first, last = row["source"].split("-")
    return {"first": int(first), "last": int(last)} | {name: value for name, value in row.items() if name != "source"}


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    width = max(len(title), *(len(row["source"]) for row in rows))
    head = f"{title:<{width}}{'tokens':>16}{'loss':>10}{'perplexity':>14}{'accuracy':>10}"
    return [head] + [
        f"{row['source']:<{width}}{row['tokens']:>16,}{row['loss']:>10.4f}{row['perplexity']:>14.3f}"
        f"{row['accuracy']:>10.2%}"
        for row in rows
    ]
