"""The recipe resolves, and the page has the figures that were measured."""

import json
from dataclasses import replace
from pathlib import Path

from megatron_aquila.config.cli import load_config

ROOT = Path(__file__).parents[2]
ROWS = {
    "as it is": "as it is |",
    "linear": "linear 4, not",
    "ntk": "ntk 4, not",
    "yarn": "yarn 4, not",
    "yarn, trained on": "yarn 4, trained on",
}
PLACES = ["--data-path", "x", "--save", "y", "--load", "z"]


def model(example, *flags):
    return load_config(["--config", str(ROOT / "examples" / example), *PLACES, *flags], world_size=None).config.model


def test_the_model_is_the_quickstarts_with_longer_samples():
    ours, theirs = model("long_context/extend.yaml"), model("quickstart/pretrain.yaml")
    assert ours.seq_len == 4 * theirs.seq_len
    stretch = {"seq_len": 512, "rope_scaling": "yarn", "rope_factor": 4.0, "init_std": ours.init_std}
    assert replace(theirs, **stretch) == ours


def test_the_pages_figures_are_the_pictures():
    page = (ROOT / "docs" / "long-context.md").read_text()
    curves = json.loads((ROOT / "docs" / "long-context.json").read_text())["curves"]
    for name, rows in curves.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {ROWS[name]}")]
        for first, last in ((0, 127), (128, 511), (384, 511)):
            shown = [row for row in rows if first <= row["first"] and row["last"] <= last]
            tokens = sum(row["tokens"] for row in shown)
            assert f"| {sum(row['loss'] * row['tokens'] for row in shown) / tokens:.3f} |" in line
    assert f"{sum(row['tokens'] for row in curves['as it is']):,} held-out tokens" in page
