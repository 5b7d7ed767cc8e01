"""What is told of a data set is what is in it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.blend import Share, open_library
from megatron_aquila.data.course import Phase, expected_readings, legs_of
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.inspect import (
    LengthBin,
    document_lengths,
    excerpt,
    pick_documents,
    read_scripts,
    script_of,
    script_shares,
    source_stats,
    summarize,
)
from megatron_aquila.data.tokenizer import Tokenizer, load_tokenizer
from megatron_aquila.errors import DataError


def write(prefix: Path, lengths: list[list[int]]) -> IndexedDataset:
    """Documents of sequences of these lengths; tokens count on."""
    token = 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in lengths:
            for length in document:
                writer.add_sequence(np.arange(token, token + length))
                token += length
            writer.end_document()
    return IndexedDataset(prefix)


def test_counts_and_lengths(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a", [[3, 4], [], [1], [20], [7], [0]])
    assert document_lengths(dataset).tolist() == [7, 0, 1, 20, 7, 0]
    found = summarize(dataset, longest=3)
    assert (found.documents, found.sequences, found.tokens, found.dtype) == (6, 6, 35, "uint16")
    assert found.longest == ((3, 20), (0, 7), (4, 7))
    assert found.percentiles == ((1, 0), (10, 0), (50, 1), (90, 20), (99, 20))
    assert found.bins == (
        LengthBin(0, 0, 2, 0),
        LengthBin(1, 1, 1, 1),
        LengthBin(2, 3, 0, 0),
        LengthBin(4, 7, 2, 14),
        LengthBin(8, 15, 0, 0),
        LengthBin(16, 31, 1, 20),
    )
    shown = found.lines()
    assert "6 documents, 6 sequences, 35 tokens (uint16)" in shown[0]
    assert [line.count("█") for line in shown[2:-1]] == [40, 20, 0, 40, 0, 20]
    assert shown[-1] == "longest: document 3 with 20, document 0 with 7, document 4 with 7"


def test_a_set_without_documents(tmp_path: Path) -> None:
    found = summarize(write(tmp_path / "a", []))
    assert (found.documents, found.bins, found.longest, found.percentiles[0]) == (0, (), (), (1, 0))
    assert found.lines()[1].startswith("tokens a document: mean 0.0")
    assert pick_documents(IndexedDataset(tmp_path / "a"), 3) == []


@pytest.fixture
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tokenizer_files["tokenizer_model"])


def test_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["one two three", "", "我们"]
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for text in texts:
            ids = tokenizer.encode(text)
            writer.add_sequence(ids[:2])
            writer.add_sequence(ids[2:])
            writer.end_document()
    dataset = IndexedDataset(tmp_path / "a")
    assert [excerpt(dataset, number, tokenizer).text for number in range(3)] == texts
    short = excerpt(dataset, 0, tokenizer, tokens=1)
    assert (short.num_tokens, short.shown_tokens) == (len(tokenizer.encode(texts[0])), 1)
    assert texts[0].startswith(short.text)
    whole = excerpt(write(tmp_path / "long", [[150, 0, 150, 7]]), 0, None, tokens=None)
    assert (whole.num_tokens, whole.shown_tokens, len(whole.text.split())) == (307, 307, 307)
    with pytest.raises(DataError, match="document 3: it has 3, from 0 on"):
        excerpt(dataset, 3, tokenizer)
    assert excerpt(dataset, 0, None, tokens=2).text == " ".join(map(str, tokenizer.encode(texts[0])[:2]))


def test_documents_are_picked_once(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a", [[1]] * 50)
    chosen = pick_documents(dataset, 20)
    assert chosen == sorted(set(chosen)) == pick_documents(dataset, 20)
    assert chosen != pick_documents(dataset, 20, seed=1)
    assert pick_documents(dataset, 80) == list(range(50))


def test_scripts(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ["我们", "Abé", "яλ", "1٢", "。_", "\n ", "\ufffd", "我a b"]
    assert list(map(script_of, cases)) == [
        *["Han", "Latin", "other letters", "digits", "signs and blanks", "signs and blanks"],
        *["parts of characters", "Latin"],
    ]
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for text in ("one two three four", "12 34", "我们"):
            writer.add_sequence([*tokenizer.encode(text), 0])
            writer.end_document()
    dataset = IndexedDataset(tmp_path / "a")
    whole = script_shares(dataset, tokenizer)
    assert list(whole.values()) == sorted(whole.values(), reverse=True)
    assert sum(whole.values()) == pytest.approx(1)
    assert whole["special"] == pytest.approx(3 / len(dataset.tokens))
    assert {"Latin", "digits"} < set(whole)
    monkeypatch.setattr("megatron_aquila.data.inspect.WINDOWS", 500)
    monkeypatch.setattr("megatron_aquila.data.inspect.WINDOW", 2)
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        for _ in range(60):
            writer.add_dataset(dataset, lambda _: None)
    drawn = script_shares(IndexedDataset(tmp_path / "c"), tokenizer)
    assert drawn["Latin"] == pytest.approx(whole["Latin"], abs=0.08)
    assert script_shares(write(tmp_path / "d", []), tokenizer) == {}


def test_epochs_of_a_blend(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a", [[30]])
    write(tmp_path / "b", [[5], [5]])
    paths = ("3", f"{tmp_path}/a", "1", f"{tmp_path}/b")
    library = open_library(paths, seq_len=4, seed=0, cache_path=None)
    readings = expected_readings(library, legs_of([Phase(start=0, paths=paths)], [20]), Share("train"))
    stats = source_stats(readings, library)
    found = [(each.documents, each.tokens, each.read_tokens, each.epochs, each.scripts) for each in stats]
    assert found == [(1, 30, 60, 2, None), (2, 10, 20, 2, None)]
    assert read_scripts(stats) == {}
    shares = read_scripts(source_stats(readings, library, tokenizer))
    assert sum(shares.values()) == pytest.approx(1)
    assert not (tmp_path / "cache").exists(), "no index is built for that"
    halves = [replace(stats[0], scripts={"Han": 1.0}), replace(stats[1], scripts={"Latin": 0.5, "Han": 0.5})]
    assert read_scripts(halves) == {"Han": 0.875, "Latin": 0.125}
