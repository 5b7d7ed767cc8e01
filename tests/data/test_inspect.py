"""What is told of a data set is what is in it."""

from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.inspect import (
    LengthBin,
    document_lengths,
    excerpt,
    pick_documents,
    script_shares,
    source_stats,
    summarize,
)
from megatron_aquila.data.tokenizer import Tokenizer, load_tokenizer


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
    with pytest.raises(IndexError, match="document 3: it has 3"):
        excerpt(dataset, 3, tokenizer)
    (stats,) = source_stats([f"{tmp_path}/a"], 2 * len(dataset.tokens), tokenizer)
    assert (stats.share, stats.epochs) == (1, 2)
    assert stats.scripts == {"Han": 2 / 13, "Latin": 11 / 13, "other letters": 0, "digits": 0, "signs": 0}


def test_documents_are_picked_once(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a", [[1]] * 50)
    chosen = pick_documents(dataset, 20)
    assert chosen == sorted(set(chosen)) == pick_documents(dataset, 20)
    assert chosen != pick_documents(dataset, 20, seed=1)
    assert pick_documents(dataset, 80) == list(range(50))


def test_scripts() -> None:
    shares = script_shares(["我 们", "Ab é", "яλ", "1٢", "。_"])
    assert shares == {"Han": 2 / 11, "Latin": 3 / 11, "other letters": 2 / 11, "digits": 2 / 11, "signs": 2 / 11}
    assert set(script_shares([]).values()) == {0}


def test_epochs_of_a_blend(tmp_path: Path) -> None:
    write(tmp_path / "a", [[30]])
    write(tmp_path / "b", [[5], [5]])
    write(tmp_path / "c", [])
    weighted = source_stats(["3", f"{tmp_path}/a", "1", f"{tmp_path}/b"], 80)
    assert [(each.share, each.epochs, each.documents) for each in weighted] == [(0.75, 2, 1), (0.25, 2, 2)]
    plain = source_stats([f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c"], 80)
    assert [(each.share, each.epochs, each.scripts) for each in plain] == [
        (0.75, 2, None),
        (0.25, 2, None),
        (0, 0, None),
    ]
