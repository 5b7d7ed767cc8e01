"""What the quickstart deletes, the outputs of an earlier one and nothing else; what its trace of a run prints."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_aquila.commands import data, preprocess
from megatron_aquila.config.schema import DataConfig
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer
from tests.train.runs import run, tiny_config

PATH = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_run", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_new_folder_is_made_and_marked(quickstart, tmp_path):
    quickstart.prepare(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [quickstart.MARKER]


def test_an_earlier_run_is_replaced_and_downloads_are_kept(quickstart, tmp_path):
    quickstart.prepare(tmp_path)
    for name in (*quickstart.OUTPUTS, "downloads", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    quickstart.prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {quickstart.MARKER, "downloads", "notes"}
    assert (tmp_path / "downloads" / "file").exists()


def test_a_folder_of_others_is_left_alone(quickstart, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").touch()
    with pytest.raises(SystemExit, match="holds checkpoints, and not from a quickstart; give another --output-dir"):
        quickstart.prepare(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", "precious"]


def test_downloads_may_be_there_first(quickstart, tmp_path):
    (tmp_path / "downloads").mkdir()
    quickstart.prepare(tmp_path)
    assert (tmp_path / "downloads").exists()


def test_a_file_is_no_folder(quickstart, tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(SystemExit, match="is no folder"):
        quickstart.prepare(tmp_path / "x")


def test_the_trace_prints_the_sentences_that_a_step_read(quickstart, tmp_path, monkeypatch, capsys):
    sentences = {"春眠不觉晓，处处闻啼鸟。", "The quick brown fox jumps over the lazy dog."}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(sentences) * 40))
    save_tokenizer_files(train_tokenizer([], 265), tmp_path / "tokenizer")
    at = quickstart.Layout(tmp_path)
    words = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "a", "--workers", 1, *at.tokenizer_flags()]
    assert preprocess.main([*map(str, words), "--append-eod"]) == 0
    files = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "special_tokens_file": "special_tokens.txt"}
    config = tiny_config(tmp_path, train_samples=16, eval_interval=0)
    run(
        replace(
            config,
            model=replace(config.model, vocab_size=265, seq_len=96),
            checkpoint=replace(config.checkpoint, save=tmp_path / "checkpoints"),
            data=DataConfig(
                path=(str(tmp_path / "a_text_document"),),
                split="1",
                prefetch=1,
                **{name: tmp_path / "tokenizer" / file for name, file in files.items()},
            ),
        )
    )
    told = []
    monkeypatch.setattr(quickstart, "run", lambda *command: told.append(list(map(str, command))))
    assert quickstart.trace in quickstart.STEPS.values()
    quickstart.trace(at)
    ((_, _, package, command, *rest),) = told
    assert (package, command) == ("megatron_aquila", "data")
    capsys.readouterr()
    assert data.main(rest) == 0
    shown = capsys.readouterr().out
    assert "step 1, sample 0: " in shown
    assert {sentence for sentence in sentences if sentence in shown} == sentences
