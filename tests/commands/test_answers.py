"""``aquila data inspect`` and ``stats``, from text to answers through the commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.commands import preprocess
from megatron_aquila.commands.answers import with_data_flag
from megatron_aquila.commands.data import main
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer

TEXTS = {"en": ["one two", "three", "one two"], "zh": ["春眠不觉晓", "处处闻啼鸟 12"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a tokenizer that knows some words."""
    made = tmp_path_factory.mktemp("tokenizer")
    texts = ["one two three four " * 20, "春眠不觉晓处处闻啼鸟 " * 20]
    save_tokenizer_files(train_tokenizer(texts, 300), made)
    names = {"vocab": "vocab.json", "merge": "merges.txt", "special-tokens": "special_tokens.txt"}
    return [word for name, file in names.items() for word in (f"--{name}-file", str(made / file))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: list[str]) -> Path:
    """Two data sets, the first with provenance."""
    made = tmp_path_factory.mktemp("answers")
    for name, texts in TEXTS.items():
        lines = [json.dumps({"text": text, "url": f"u{number}"}) + "\n" for number, text in enumerate(texts)]
        (made / f"{name}.jsonl").write_text("".join(lines))
        arguments = ["--input", str(made / f"{name}.jsonl"), "--output-prefix", str(made / name), *tokenizer]
        arguments += ["--workers", "1", "--append-eod", "--tokenizer-backend", "tokenizers", "--deduplicate"]
        assert preprocess.main([*arguments, *(["--keep-meta", "url"] if name == "en" else [])]) == 0
    return made


def test_inspect(folder: Path, tokenizer: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets, picture = [f"{folder}/en_text_document", f"{folder}/zh_text_document"], tmp_path / "lengths.png"
    arguments = [f"{sets[0]}.idx", sets[1], "--longest", "1", "--picture", str(picture), *tokenizer]
    assert main(["inspect", *arguments]) == 0
    shown = capsys.readouterr().out
    assert f"{sets[0]}: 2 documents, 2 sequences, " in shown
    assert f"{sets[1]}: 2 documents, 2 sequences, " in shown
    assert re.search(rf"document 1: \d+ tokens, from {folder}/en.jsonl:2, url u1\n  three</s>\n", shown)
    assert re.search(r"document 1: \d+ tokens\n  处处闻啼鸟 12</s>\n", shown)
    assert shown.count("longest: document ") == 2
    assert shown.endswith(f"wrote {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "0.5", sets[0], "0.5", sets[1], "--samples", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "no tokenizer is named: ids are shown, not texts\n"
    assert len(re.findall(r"^document \d+: \d+ tokens.*\n  [\d ]+$", printed.out, re.MULTILINE)) == 2
    assert main(["inspect", sets[1], "--document", "1"]) == 0
    assert "document 1: " in capsys.readouterr().out


def test_a_document_is_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "long", np.uint16) as writer:
        writer.add_documents(np.arange(300), np.array([300]))
    asked = ["inspect", f"{tmp_path}/long", "--document", "0"]
    assert main(asked) == 0
    assert "document 0: 300 tokens, the first 200\n  0 1 2" in capsys.readouterr().out
    assert main([*asked, "--full"]) == 0
    shown = capsys.readouterr().out
    assert "document 0: 300 tokens\n  0 1 2" in shown
    assert shown.endswith(" 298 299\n")


def test_stats(folder: Path, tokenizer: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sets = [f"{folder}/en_text_document", f"{folder}/zh_text_document"]
    arguments = ["0.25", sets[0], "0.75", sets[1], "--seq-len", "4", "--split", "1", *tokenizer]
    assert main(["stats", *arguments, "--tokens", "4001"]) == 0
    head, english, scripts, chinese, _, of_all = capsys.readouterr().out.splitlines()
    assert head == "1,001 samples of 4 tokens, 4,004 tokens, are read of 2 sets"
    number = r"([\d,]+)"
    found = re.fullmatch(
        rf"  {sets[0]}: 2 documents, {number} tokens; 25.00% of what is read, {number}.\d\d epochs", english
    )
    assert found is not None
    assert int(found[2].replace(",", "")) == 1001 // int(found[1])
    assert scripts.startswith("    Latin ")
    assert f"{sets[1]}: 2 documents" in chinese
    assert re.match(r"of what is read: .*Han \d+\.\d% \([\d,]+\)", of_all)
    assert main(["stats", *sets, "--seq-len", "4", "--train-samples", "3", "--split", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect", "--data-path: no data set is named; give prefixes"),
        ("stats", "--data-path: no data set is named; give prefixes"),
        ("inspect SET --picture p.gif", "--picture p.gif: the end of its name does not say what to draw; end it in"),
        ("inspect SET --picture nowhere/p.png", "--picture nowhere/p.png: nowhere is no folder; make it, or choose"),
        ("inspect SET --samples -1", "--samples -1: no documents are so few; use 0 or more"),
        ("inspect SET --longest -1", "--longest -1: no documents are so few; use 0 or more"),
        ("inspect SET --document 7", "document 7: it has 2, from 0 on"),
        ("inspect nowhere", "nowhere.idx: cannot be read"),
        ("stats SET --tokens 0", "--tokens 0: nothing is read; use 1 or more"),
        ("stats 1 SET 2", "weights and prefixes do not pair up"),
    ],
)
def test_questions_without_answer(folder: Path, capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    assert main(command.replace("SET", f"{folder}/en_text_document").split()) == 2
    assert message in capsys.readouterr().err


def test_another_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer_files(train_tokenizer([], 265), tmp_path)
    names = {"vocab": "vocab.json", "merge": "merges.txt", "special-tokens": "special_tokens.txt"}
    flags = [word for name, file in names.items() for word in (f"--{name}-file", str(tmp_path / file))]
    assert main(["inspect", f"{folder}/en_text_document", *flags]) == 2
    assert "it was tokenized by another tokenizer" in capsys.readouterr().err


def test_words_before_the_flags_are_data(tmp_path: Path) -> None:
    assert with_data_flag(["0.5", "a.bin", "1", "b", "--seed", "3"]) == [
        *["--data-path", "0.5", "a", "1", "b", "--seed", "3"]
    ]
    assert with_data_flag(["--config", "c.yaml"]) == ["--config", "c.yaml"]


def test_they_start_without_torch() -> None:
    code = (
        "import sys, megatron_aquila.commands.data; print({'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
