"""Runs of Han characters are cut only where no token can reach across; C++ and Python cut alike."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_aquila.data import native, reference
from megatron_aquila.data.encoders import GigatokenEncoder, ReferenceEncoder, first_difference
from megatron_aquila.data.han_breaks import MARK, byte_letters, mark_id, pair_table
from megatron_aquila.data.tokenizer import LibraryTokenizer, Tokenizer, load_tokenizer
from megatron_aquila.data.tokenizer_training import train_tokenizer

HAN = "一乙丁七万丈三上下不与丐丑专且丕世丘丙业丛东丝丢两严並丧中丰串"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """So many merges of so few characters that tokens end and begin within them."""
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list(HAN), size=draw.integers(1, 6), p=None)) for _ in range(400)]
    return train_tokenizer([*texts, *["一乙丁七", "万丈三上"] * 50], 700)


han_texts = st.text(st.sampled_from(HAN + "鿿㐀가aé \n1，"), max_size=40)


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> GigatokenEncoder:
    pytest.importorskip("gigatoken")
    assert mark_id(tokenizer) is not None
    return GigatokenEncoder(tokenizer)


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> NDArray[np.uint8]:
    made = pair_table(tokenizer)
    assert made is not None
    return made


@given(texts=st.lists(han_texts, max_size=5))
def test_the_ids_stay(tokenizer: Tokenizer, fast: GigatokenEncoder, texts: list[str]) -> None:
    assert first_difference(fast, ReferenceEncoder(tokenizer), texts) is None


def test_a_cut_through_a_token_would_be_seen(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    if native.INDEX_BUILDER != "C++ extension":
        pytest.skip("runs are cut only where the C++ extension is built")
    everywhere = np.zeros(1 << 19, dtype=np.uint8)
    monkeypatch.setattr("megatron_aquila.data.encoders.pair_table", lambda _: everywhere)
    wrong = first_difference(GigatokenEncoder(tokenizer), ReferenceEncoder(tokenizer), ["一乙丁七"])
    assert wrong == "gigatoken gives other ids than tokenizers for the text '一乙丁七'"


@given(text=han_texts)
def test_cpp_cuts_as_python_does(table: NDArray[np.uint8], text: str) -> None:
    marked = native.insert_breaks(text.encode(), table, ord(MARK))
    assert marked == reference.insert_breaks(text.encode(), table, ord(MARK))
    assert marked.replace(MARK.encode(), b"") == text.encode()


def test_what_is_cut(table: NDArray[np.uint8]) -> None:
    assert native.insert_breaks("一乙丁七a鿿㐀鿾，鿿".encode(), table, 1).decode() == "一乙丁七a鿿\x01㐀\x01鿾，鿿"
    if native.INDEX_BUILDER == "C++ extension":
        with pytest.raises(ValueError, match="a table of another size"):
            native.insert_breaks(b"", table[1:], 1)


def test_parts_of_characters_keep_all_they_may_belong_to() -> None:
    letters = byte_letters()
    data = "一乙".encode()
    start, whole = data[:4], data[1:]  # a character and the first byte of the next; the end of one and the next
    for part, pair in ((start, "一鿿"), (whole, "万乙")):
        token = "".join(letters[byte] for byte in part)
        vocab = {letter: number for number, letter in enumerate(letters)} | {token: 256}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        only = LibraryTokenizer(
            kind="HuggingFaceTokenizer", model=model, bos_token=None, eod_token=None, pad_token=None
        )
        table = pair_table(only)
        assert table is not None
        can_be = (part == start and pair[1].encode()[:1] == part[3:]) or pair[0].encode().endswith(part[:2])
        cut = MARK in reference.insert_breaks(pair.encode(), table, ord(MARK)).decode()
        assert cut != can_be


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.update(normalizer={"type": "NFC"}),
        lambda model: model["model"].update(ignore_merges=True),
        lambda model: model["model"].update(dropout=0.1),
        lambda model: model["pre_tokenizer"].update(add_prefix_space=True),
        lambda model: model.update(pre_tokenizer=None),
    ],
)
def test_other_words_are_left_alone(tokenizer: Tokenizer, change: object) -> None:
    model = json.loads(tokenizer.model.to_str())
    change(model)  # type: ignore[operator]
    other = replace(tokenizer, model=tokenizers.Tokenizer.from_str(json.dumps(model)))
    assert mark_id(other) is None


def test_a_vocabulary_of_nothing_but_parts_is_left_alone(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr("megatron_aquila.data.han_breaks.MOST_PAIRS", -1)
    assert pair_table(tokenizer) is None


def test_aquilas_own(aquila_tokenizer_dir: Path) -> None:
    names = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "special_tokens_file": "special_tokens.txt"}
    files = {flag: aquila_tokenizer_dir / name for flag, name in names.items()}
    aquila = load_tokenizer("AquilaTokenizer", **files)
    assert mark_id(aquila) is not None
    table = pair_table(aquila)
    assert table is not None
    assert 0.005 < np.unpackbits(table).mean() < 0.1
