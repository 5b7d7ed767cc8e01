"""A picture of a run: loss, learning rate and throughput by step."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_aquila.observe.meters import Value

PANELS = {"loss": "loss (nats per token)", "lr": "learning rate", "tokens_per_second": "tokens / s"}


def plot_log(
    rows: Sequence[Mapping[str, Value]], path: Path, *, title: str, marks: Mapping[int, str] | None = None
) -> None:
    """Draw the rows of ``read_log`` into the PNG ``path``, one panel a figure.

    ``marks`` draws a labelled vertical line at a step: a resume, say. Validation losses are dots on the loss panel.
    The file appears whole or not at all. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(title)
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
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format="png", dpi=120)
    os.replace(beside, path)
