"""The recipe resolves and runs, and page and picture have the figures that were measured."""

import importlib.util
import io
import json
import math
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from megatron_aquila.commands import evaluate, preprocess, pretrain
from megatron_aquila.config.cli import load_config
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("long_context_run", ROOT / "examples" / "long_context" / "run.py")
RUN = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(RUN)
ROWS = {
    "as it is": "as it is |",
    "linear": "linear 4, not",
    "ntk": "ntk 4, not",
    "yarn": "yarn 4, not",
    "as it is, trained on": "as it is, trained on",
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
    assert {*curves} == {*ROWS}
    for name, rows in curves.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {ROWS[name]}")]
        for first, last in ((0, 127), (128, 511), (384, 511)):
            shown = [row for row in rows if first <= row["first"] and row["last"] <= last]
            tokens = sum(row["tokens"] for row in shown)
            assert f"| {math.exp(sum(row['loss'] * row['tokens'] for row in shown) / tokens):.1f} |" in line
    assert f"{sum(row['tokens'] for row in curves['as it is']):,} held-out tokens" in page


def test_the_picture_is_drawn_of_the_figures():
    """Heights in the upper panel are logarithms of perplexity, in the lower its share of the first curve's."""
    curves = json.loads((ROOT / "docs" / "long-context.json").read_text())["curves"]
    drawn = (ROOT / "docs" / "long-context.svg").read_text()
    paths = [re.findall(r"[ML] [\d.]+ ([\d.]+)", path) for path in re.findall(r'<path d="([^"]*)"', drawn)]
    lines = [[float(y) for y in path] for path in paths if len(path) == 16]
    perplexities = [[row["perplexity"] for row in rows] for rows in curves.values()]
    shares = [[one / first for one, first in zip(each, perplexities[0], strict=True)] for each in perplexities]
    assert len(lines) == 2 * len(curves)
    for panel, values in (
        (lines[: len(curves)], [[math.log(value) for value in each] for each in perplexities]),
        (lines[len(curves) :], shares),
    ):
        heights, expected = [*chain(*panel)], [*chain(*values)]
        low, high = expected.index(min(expected)), expected.index(max(expected))
        scale = (heights[high] - heights[low]) / (expected[high] - expected[low])
        assert scale < 0, "up is more"
        assert heights == pytest.approx([heights[low] + scale * (x - expected[low]) for x in expected], abs=0.01)
    for name in ("perplexity", *curves):
        assert f"<!-- {name} -->" in drawn


TEXTS = {"zh": "海上的星星和月亮。", "en": "the sea and the stars ", "code": "def sea(stars): return stars\n"}


@pytest.fixture
def quickstart(tmp_path):
    """What the quickstart leaves, of a few documents and one step."""
    folder = tmp_path / "quickstart"
    save_tokenizer_files(train_tokenizer(list(TEXTS.values()) * 4, 300), folder / "tokenizer")
    (folder / "corpus").mkdir()
    (folder / "data").mkdir()
    for language, text in TEXTS.items():
        path = folder / "corpus" / f"{language}.jsonl"
        path.write_text("".join(json.dumps({"text": text * 24}) + "\n" for _ in range(8)))
        out = ["--output-prefix", folder / "data" / language, "--append-eod", "--workers", 1]
        command("tools/preprocess_data.py", "--input", path, *out, *RUN.tokenizer_flags(folder))
    blend = [part for language in TEXTS for part in (1, folder / "data" / f"{language}_text_document")]
    config = small(ROOT / "examples" / "quickstart" / "pretrain.yaml", tmp_path / "pretrain.yaml")
    places = ["--data-path", *blend, "--data-cache-path", tmp_path / "cache", "--save", folder / "checkpoints"]
    layout = ["--tp", 1, "--pp", 1, "--no-sequence-parallel"]
    command("pretrain_aquila.py", "--config", config, *places, *layout, *RUN.tokenizer_flags(folder))
    return folder


def small(source, target):
    """The YAML with one step of training, and the tokenizer's vocabulary."""
    text = (
        re.sub(r"train_samples: \d+", "train_samples: 8", source.read_text())
        .replace("4096", "300")
        .replace("98,2,0", "75,25,0")
    )
    target.write_text(re.sub(r"lr_warmup_samples: \d+", "lr_warmup_samples: 0", text))
    return target


def command(*words):
    """A command of run.py in this process, and what it prints: torchrun's is one rank's."""
    words = [str(word) for word in words]
    mains = {"tools/preprocess_data.py": preprocess, "evaluate": evaluate, "pretrain_aquila.py": pretrain}
    (place,) = [place for place, word in enumerate(words) if word in mains]
    with io.StringIO() as out:
        with redirect_stdout(out):
            assert mains[words[place]].main(words[place + 1 :]) == 0
        return out.getvalue()


def test_the_recipe_runs(quickstart, tmp_path, monkeypatch, capsys):
    small(ROOT / "examples" / "long_context" / "extend.yaml", tmp_path / "extend.yaml")
    control = [*RUN.AS_BEFORE]
    control[control.index("--train-samples") + 1] = 32
    control[control.index("--lr-warmup-samples") + 1] = 0
    changes = {
        "run": command,
        "HERE": tmp_path,
        "HELD_OUT": 0.25,
        "AFTER": RUN.AFTER | {"as it is, trained on": control},
    }
    for name, value in changes.items():
        monkeypatch.setattr(RUN, name, value)
    out = tmp_path / "out"
    argv = ["run.py", "--quickstart", str(quickstart), "--output-dir", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    RUN.main()
    found = json.loads((out / "long-context.json").read_text())["curves"]
    assert {*found} == {*ROWS}
    assert {len(rows) for rows in found.values()} == {16}
    assert len({tuple(row["tokens"] for row in rows) for rows in found.values()}) == 1, "the same tokens for all"
    assert len({rows[-1]["loss"] for rows in found.values()}) == len(ROWS), "by six different models"
    assert (out / "long-context.svg").exists()
    assert "as it is, trained on" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="out is not empty"):
        RUN.main()
    monkeypatch.setattr(sys, "argv", [*argv[:2], str(tmp_path), *argv[3:]])
    with pytest.raises(SystemExit, match=r"has no checkpoints; run examples/quickstart/run\.py"):
        RUN.main()


def test_the_control_has_as_many_tokens_and_steps():
    flags = [str(word) for word in RUN.AS_BEFORE]
    configs = [
        load_config(["--config", str(ROOT / "examples/long_context/extend.yaml"), *PLACES, *more], world_size=2).config
        for more in ([], flags)
    ]
    ours, control = (replace(config.train, micro_batch=1) for config in configs)
    assert control.train_samples == 4 * ours.train_samples
    assert control.global_batch == 4 * ours.global_batch
    lengths = [config.model.seq_len for config in configs]
    assert lengths == [512, 128]
    assert configs[1].model.rope_scaling == "none"
    assert configs[1].optim.lr_warmup_samples == 4 * configs[0].optim.lr_warmup_samples
