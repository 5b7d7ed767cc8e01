import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import megatron_preprocess, preprocess
from benchmarks.common import Record
from megatron_aquila.data.aquila_tokens import AQUILA_SPECIAL_TOKENS
from megatron_aquila.data.tokenizer import library_of, tokenizer_at

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
    assert preprocess.main([*flags, "--tiny", "--workers", "1", "--out", str(out), "--peer-megabytes", "0"]) == 0
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
        return {"megabytes": 4.0, "seconds": next(seconds)}

    monkeypatch.setattr(preprocess, "measured", measured)
    with pytest.raises(StopIteration):
        preprocess.main(["--input", str(corpus), "--tokenizer", str(tmp_path), "--out", str(out)])
    tables = json.loads(out.read_text())["tables"]
    start, few = ({"megabytes": 4.0, "seconds": best} for best in (2.0, 5.0))
    assert tables["start-up"] == [{"corpus": "one_document", **start, "slowest": 3.0, "calls": 2}]
    behind = {"megabytes_per_second_behind_start": 2.0}  # of the start that was known then
    assert tables["corpora"] == [{"corpus": "few", **few, "slowest": 5.0, "calls": 1, **behind}]


def test_a_command_that_fails_is_an_error(tmp_path, tokenizer):
    options = preprocess.Options(input=(tmp_path / "absent.jsonl",), tokenizer=tokenizer)
    with pytest.raises(AssertionError, match=r"absent.jsonl"):
        preprocess.measured(options.input[0], options, tmp_path / "made")


@pytest.mark.parametrize("is_same", [True, False])
def test_a_peer_makes_the_same_part_and_ours_has_a_ratio(tmp_path, tokenizer, monkeypatch, is_same):
    corpus, out = tmp_path / "corpus" / "few.jsonl", tmp_path / "x.json"
    corpus.parent.mkdir()
    corpus.write_text('{"text": "some words"}\n' * 5)
    commands = []

    def wrote(prefix, text):
        for end in (".bin", ".idx"):
            prefix.with_suffix(end).write_text(text)
        return {"seconds": 3.0 if text == "theirs" else 1.5, "cpu_seconds": 1.0, "peak_mib": 1.0}

    def timed(command):
        commands.append(command)
        return wrote(tmp_path / "theirs", "theirs"), ""

    def measured(corpus, options, prefix, *more):
        assert more == ("--allow-special-tokens",)
        return wrote(tmp_path / "made_text_document", "theirs" if is_same else "ours") | {"seconds": 1.5}

    monkeypatch.setattr(preprocess, "timed", timed)
    monkeypatch.setattr(preprocess, "measured", measured)
    options = preprocess.Options(input=(corpus,), tokenizer=tokenizer, rounds=2, peer_megabytes=0.00004)
    record = Record("preprocess", settings=options, device=torch.device("cpu"), out=out)
    preprocess.measure_peer(record, options, tmp_path)
    theirs, ours = json.loads(out.read_text())["tables"]["beside megatron-core"]
    assert (theirs["name"], theirs["calls"], theirs["ratio"]) == ("megatron-core", 2, None)
    assert (ours["name"], ours["ratio"], ours["same_files"]) == ("megatron_aquila", 2.0, is_same)
    assert "benchmarks.megatron_preprocess" in commands[0]
    assert theirs["documents"] == len((tmp_path / "few.jsonl").read_text().splitlines()) == 2, "whole lines"


def test_megatron_s_way_writes_each_document_and_its_end(tmp_path, tokenizer, monkeypatch):
    corpus = tmp_path / "few.jsonl"
    corpus.write_text('{"text": "some words"}\n{"text": ""}\n')
    model = library_of(tokenizer_at(tokenizer))
    (tmp_path / "tokenizer.json").write_text(json.dumps(model.description))
    documents = []

    class Builder:
        def __init__(self, path, dtype):
            documents.append((path, dtype))

        def add_document(self, ids, lengths):
            documents.append((ids, lengths))

        def finalize(self, path):
            documents.append(path)

    module = SimpleNamespace(
        IndexedDatasetBuilder=Builder, DType=SimpleNamespace(optimal_dtype=lambda size: f"for {size}")
    )
    for name in ("megatron", "megatron.core", "megatron.core.datasets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.indexed_dataset", module)
    flags = ["--input", str(corpus), "--output", "out", "--tokenizer", str(tmp_path / "tokenizer.json"), "--eod", "7"]
    assert megatron_preprocess.main([*flags, "--vocab-size", "300", "--workers", "1"]) == 0
    ids = [*model.encode("some words"), 7]
    assert documents == [("out.bin", "for 300"), (ids, [len(ids)]), ([], []), "out.idx"]


def test_another_tokenizer_is_given_as_its_file(tmp_path, tokenizer):
    assert preprocess.tokenizer_flags(tokenizer)[::2] == [*preprocess.TOKENIZER_FILES]
    other = preprocess.tokenizer_flags(tmp_path / "tokenizer.json")
    assert other == ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "tokenizer.json")]


def test_memory_of_this_process():
    assert preprocess.tree(os.getpid())[0] == os.getpid()
    assert preprocess.proportional_bytes(os.getpid()) > 2**20
    assert (preprocess.proportional_bytes(2**30), preprocess.tree(2**30)) == (0, [2**30])
    assert "torch" in sys.modules
