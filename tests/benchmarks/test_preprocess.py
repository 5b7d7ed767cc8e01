import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import preprocess
from megatron_aquila.data.aquila_tokens import AQUILA_SPECIAL_TOKENS

SMALL = Path(__file__).parents[1] / "data" / "megatron"


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    shutil.copy(SMALL / "vocab.json", folder)
    merges = json.loads((SMALL / "merges.json").read_text(encoding="utf-8"))
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    (folder / "special_tokens.txt").write_text("\n".join(AQUILA_SPECIAL_TOKENS), encoding="utf-8")
    return folder


def test_a_corpus_and_one_document_are_measured(tmp_path, tokenizer):
    corpus, out = tmp_path / "few.jsonl", tmp_path / "x.json"
    corpus.write_text('{"text": "some words"}\n' * 500)
    flags = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--rounds", "1", "--backend", "tokenizers"]
    assert preprocess.main([*flags, "--tiny", "--workers", "1", "--out", str(out)]) == 0
    made = json.loads(out.read_text())
    assert made["settings"]["input"] == ["few.jsonl"], "whose folder is nobody's business"
    [start], [row] = made["tables"]["start-up"], made["tables"]["corpora"]
    assert (start["documents"], row["documents"], row["corpus"], row["backend"]) == (1, 500, "few", "tokenizers")
    assert row["cpu_seconds"] > 0
    assert 20 < row["peak_mib"] < 600


def test_what_was_found_is_on_file_when_a_later_round_fails(tmp_path, monkeypatch):
    corpus, out = tmp_path / "few.jsonl", tmp_path / "x.json"
    seconds = iter([3.0, 5.0, 2.0])

    def measured(*_):
        return {"seconds": next(seconds)}

    monkeypatch.setattr(preprocess, "measured", measured)
    with pytest.raises(StopIteration):
        preprocess.main(["--input", str(corpus), "--tokenizer", str(tmp_path), "--out", str(out)])
    tables = json.loads(out.read_text())["tables"]
    assert tables["start-up"] == [{"corpus": "one_document", "seconds": 2.0, "slowest": 3.0, "calls": 2}]
    assert tables["corpora"] == [{"corpus": "few", "seconds": 5.0, "slowest": 5.0, "calls": 1}]


def test_a_command_that_fails_is_an_error(tmp_path, tokenizer):
    options = preprocess.Options(input=(tmp_path / "absent.jsonl",), tokenizer=tokenizer)
    with pytest.raises(AssertionError, match=r"absent.jsonl"):
        preprocess.measured(options.input[0], options, tmp_path / "made")


def test_memory_of_this_process():
    assert preprocess.tree(os.getpid())[0] == os.getpid()
    assert preprocess.proportional_bytes(os.getpid()) > 2**20
    assert (preprocess.proportional_bytes(2**30), preprocess.tree(2**30)) == (0, [2**30])
    assert "torch" in sys.modules
