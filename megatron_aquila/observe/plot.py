"""Pictures: loss, learning rate and throughput of a run by step; how long the documents of data sets are."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_aquila.errors import DataError
from megatron_aquila.observe.meters import Value

Bin = tuple[int, int, int, int]  # documents of so many to so many tokens, both included; documents, tokens
SETS = 10  # that lines can be told apart of
PANELS = {"loss": "loss (nats per token)", "lr": "learning rate", "tokens_per_second": "tokens / s"}


def plot_log(
    rows: Sequence[Mapping[str, Value]], path: Path, *, title: str, marks: Mapping[int, str] | None = None
) -> None:
    """Draw the rows of ``read_log`` into the PNG ``path``, one panel a figure.

    ``marks`` draws a labelled vertical line at a step: a resume, say. Validation losses are dots on the loss panel.
    The file appears whole or not at all.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure((9, 8), title)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        shown = [row for row in rows if name in row]
        axis.plot([row["step"] for row in shown], [row[name] for row in shown], linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        for step, text in (marks or {}).items():
            axis.axvline(step, color="tab:red", linestyle="--", linewidth=1, label=text)
    if valid := [row for row in rows if "valid_loss" in row]:
        steps, losses = [row["step"] for row in valid], [row["valid_loss"] for row in valid]
        axes[0].plot(steps, losses, "o", markersize=4, label="validation")
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend()
    axes[-1].set_xlabel("step")
    _save(figure, path, "png")


def plot_lengths(sets: Mapping[str, Sequence[Bin]], path: Path, *, title: str) -> None:
    """Draw how documents and tokens of each data set are spread over the lengths of documents, as shares of the set.

    ``path`` ends in .png, .svg or .pdf. The ``SETS`` sets of the most tokens are drawn. The file appears whole or not
    at all.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    shown = sorted(sets.items(), key=lambda item: -sum(tokens for *_, tokens in item[1]))[:SETS]
    figure = _figure((9, 7), title if len(shown) == len(sets) else f"{title}: the {SETS} largest of {len(sets)} sets")
    axes = figure.subplots(2, 1, sharex=True)
    for place, (axis, what) in enumerate(zip(axes, ("documents", "tokens"), strict=True), 2):
        for name, bins in shown:
            total = max(sum(found[place] for found in bins), 1)
            edges = [max(found[0], 0.5) for found in bins] + [bins[-1][1] + 1] if bins else [0.5, 1]
            shares = [100 * found[place] / total for found in bins] or [0]
            label = f"{name} ({total:,} {what})"
            axis.stairs(shares, edges, fill=len(shown) == 1, alpha=0.8, linewidth=1.6, label=label)
        axis.set_ylabel(f"% of the {what}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[-1].set_xscale("log", base=2)
    axes[-1].xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}" if length >= 1 else "0")
    axes[-1].set_xlabel("tokens of a document")
    _save(figure, path, path.suffix.removeprefix("."))


def plot_positions(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str, trained_len: int
) -> None:
    """Draw perplexity by position, as ``aquila evaluate --by-position --json`` has it, of several models or settings.

    The same tokens were scored by all, so a second panel has each one's share of the first one's. A line stands where
    training ended. Perplexity's axis is logarithmic: equal differences of losses look equal. ``path`` ends in .png,
    .svg or .pdf; the file appears whole or not at all.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure((9, 8), title)
    axes = figure.subplots(2, 1, sharex=True)
    first = next(iter(curves.values()))
    middles = [(row["first"] + row["last"]) / 2 for row in first]
    for name, rows in curves.items():
        axes[0].plot(middles, [row["perplexity"] for row in rows], "o-", markersize=3, linewidth=1.4, label=name)
        shares = [row["perplexity"] / other["perplexity"] for row, other in zip(rows, first, strict=True)]
        axes[1].plot(middles, shares, "o-", markersize=3, linewidth=1.4)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    axes[0].yaxis.set_minor_formatter("{x:,.0f}")
    for axis, label in zip(axes, ("perplexity", f"share of that of “{next(iter(curves))}”"), strict=True):
        axis.axvline(trained_len, color="grey", linestyle="--", linewidth=1, label=f"trained on {trained_len} tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    axes[1].set_xlabel("position in the sample")
    _save(figure, path, path.suffix.removeprefix("."))


def _figure(size: tuple[float, float], title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("a picture needs the matplotlib package: pip install 'megatron_aquila[plots]'") from error
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure


def _save(figure: Any, path: Path, form: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(beside, format=form, dpi=120)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
