"""Every backend gives the reference's ids; gigatoken is taken only where it does."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from megatron_aquila.data import encoders
from megatron_aquila.data.encoders import (
    BORDER,
    Encoded,
    GigatokenEncoder,
    ReferenceEncoder,
    check_ids,
    choose_encoder,
    first_difference,
)
from megatron_aquila.data.tokenizer import LibraryTokenizer, Tokenizer, load_tokenizer
from megatron_aquila.errors import ConfigError, DataError

HOSTILE = ["", "</s>", f"a{BORDER}b", BORDER, "", "[CLS]x<|endoftext|>", " 测试abc测试\n\n 1234", "\x00\x01"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("AquilaTokenizer", **tokenizer_files)


def same(ours: Encoded, theirs: Encoded) -> bool:
    return np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.lengths, theirs.lengths)


@pytest.mark.parametrize("end", [None, 7])
def test_the_reference_is_the_tokenizer(tokenizer: Tokenizer, end: int | None) -> None:
    encoded = ReferenceEncoder(tokenizer).encode(HOSTILE, end)
    expected = [tokenizer.encode(text) for text in HOSTILE]
    after = [] if end is None else [end]
    assert encoded.tokens.tolist() == [number for ids in expected if ids for number in [*ids, *after]]
    assert encoded.lengths.tolist() == [len(ids) + len(after) if ids else 0 for ids in expected]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("end", [None, 7])
def test_gigatoken_gives_the_same_ids(
    tokenizer: Tokenizer, megatron_fixtures: Path, end: int | None, allowed: bool
) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = replace(tokenizer, allow_special_tokens=allowed)
    reference = ReferenceEncoder(tokenizer)
    texts = [*HOSTILE, *json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))]
    fast = GigatokenEncoder(tokenizer)
    for part in ([], [""], ["", "a"], ["a", ""], HOSTILE, texts):
        assert same(fast.encode(part, end), reference.encode(part, end))
    assert same(pickle.loads(pickle.dumps(fast)).encode(texts, end), reference.encode(texts, end))


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> GigatokenEncoder:
    pytest.importorskip("gigatoken")
    return GigatokenEncoder(tokenizer)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_whatever_the_text(tokenizer: Tokenizer, fast: GigatokenEncoder, texts: list[str]) -> None:
    assert first_difference(fast, ReferenceEncoder(tokenizer), texts) is None


class Wrong(ReferenceEncoder):
    """Differs in texts that hold a z."""

    def encode(self, texts: Sequence[str], end: int | None) -> Encoded:
        return super().encode([text.replace("z", "y") for text in texts], end)


def test_the_choice(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample() -> list[str]:
        return ["the user's own zoo"]

    assert choose_encoder("tokenizers", tokenizer, sample).why == "tokenizers, as asked for"
    monkeypatch.setattr(encoders, "GigatokenEncoder", Wrong)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleType(name))
    chosen = choose_encoder("auto", tokenizer, sample)
    assert type(chosen.encoder) is ReferenceEncoder
    assert chosen.why == 'tokenizers: gigatoken gives other ids than tokenizers for the text "the user\'s own zoo"'
    with pytest.raises(ConfigError, match=r"--tokenizer-backend gigatoken: gigatoken gives other ids .*; use auto or"):
        choose_encoder("gigatoken", tokenizer, sample)
    equal = choose_encoder("auto", tokenizer, lambda: ["the user's own"])
    assert isinstance(equal.encoder, Wrong)
    assert equal.why.startswith("gigatoken: equal to tokenizers on 8 texts")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "not installed: pip install 'megatron_aquila[fast]'" in choose_encoder("auto", tokenizer, sample).why


def test_a_tokenizer_that_gigatoken_does_not_know() -> None:
    pytest.importorskip("gigatoken")
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    words = LibraryTokenizer(kind="HuggingFaceTokenizer", model=model, bos_token=None, eod_token=None, pad_token=None)
    chosen = choose_encoder("auto", words, list)
    assert type(chosen.encoder) is ReferenceEncoder
    assert "gigatoken cannot take this tokenizer" in chosen.why


def test_ids_outside_the_vocabulary() -> None:
    def encoded(*ids: int) -> Any:
        return Encoded(np.array(ids, dtype=np.uint32), np.array([len(ids)]))

    assert check_ids(encoded(3, 9), 10) == 9
    assert check_ids(encoded(), 10) == -1
    with pytest.raises(DataError, match="made id 10, but its vocabulary has 10"):
        check_ids(encoded(10), 10)
