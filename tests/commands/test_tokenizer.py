"""``aquila tokenizer train``: files, the table, and its exit status."""

import json
from pathlib import Path

import pytest

from megatron_aquila.commands import tokenizer


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in {"a": ["aa aa", "aa"], "b": ["é"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    out = tmp_path / "out"
    assert tokenizer.main(["train", "--input", *inputs, "--vocab-size", "266", "--output", str(out)]) == 0
    assert "aa" in json.loads((out / "vocab.json").read_text(encoding="utf-8"))
    size, head, first, second = capsys.readouterr().out.splitlines()
    assert size == f"266 tokens, in {out}"
    assert head.split() == ["file", "documents", "tokens/document", "bytes/token"]
    assert first.split() == ["a.jsonl", "2", "2.0", "1.75"]
    assert second.split() == ["b.jsonl", "1", "2.0", "1.00"]


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"body": "a"}\n')
    arguments = ["train", "--input", str(tmp_path / "in.jsonl"), "--vocab-size", "266", "--output", str(tmp_path / "o")]
    assert tokenizer.main(arguments) == 2
    assert "in.jsonl:1: no key 'text'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
