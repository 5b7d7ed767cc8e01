"""Old ids stay, new pieces are used, and every new token is made of old ones."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from megatron_aquila.data.tokenizer import LibraryTokenizer, Tokenizer, load_tokenizer, tokenizer_at
from megatron_aquila.data.tokenizer_extension import extend, old_pieces, save_tokenizer
from megatron_aquila.data.tokenizer_training import train_tokenizer
from megatron_aquila.errors import DataError
from tests.data.sentencepieces import CHINESE, ENGLISH, sentencepieces


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    return train_tokenizer(ENGLISH, 285)


@pytest.fixture(scope="module")
def extended(base: Tokenizer) -> Tokenizer:
    return extend(base, train_tokenizer(CHINESE, 295))


def test_old_ids_stay_and_new_pieces_are_used(base: Tokenizer, extended: Tokenizer, tmp_path: Path) -> None:
    assert extended.vocab_size > base.vocab_size
    assert [extended.token_bytes(n) for n in range(base.vocab_size)] == [
        base.token_bytes(n) for n in range(base.vocab_size)
    ]
    assert (extended.bos, extended.eod, extended.pad) == (base.bos, base.eod, base.pad)
    assert extended.encode(ENGLISH[0]) == base.encode(ENGLISH[0])
    text = "海上的星星"
    assert len(extended.encode(text)) < len(base.encode(text)) / 2
    assert max(extended.encode(text)) >= base.vocab_size
    save_tokenizer(extended, tmp_path / "out")
    again = tokenizer_at(tmp_path / "out")
    assert again.encode_batch([text, *ENGLISH]) == extended.encode_batch([text, *ENGLISH])
    assert (again.vocab_size, again.eod) == (extended.vocab_size, base.eod)
    assert extend(extended, base).vocab_size == extended.vocab_size, "nothing is added twice"


@given(st.binary())
def test_any_bytes_come_back(base: Tokenizer, extended: Tokenizer, data: bytes) -> None:
    for one in (base, extended):
        assert one.decode_bytes(one.encode_bytes(data)) == data


@given(st.text())
def test_bytes_of_text_are_encoded_as_text(base: Tokenizer, text: str) -> None:
    assert base.encode_bytes(text.encode()) == base.encode(text)


def test_a_new_token_is_made_of_old_ones(base: Tokenizer, extended: Tokenizer) -> None:
    pieces = old_pieces(base, extended)
    assert [pieces[n] for n in range(base.vocab_size)] == [(n,) for n in range(base.vocab_size)]
    for number in range(base.vocab_size, extended.vocab_size):
        assert base.decode_bytes(pieces[number]) == extended.token_bytes(number)
    with pytest.raises(DataError, match="extend the old one, so that ids are kept"):
        old_pieces(base, train_tokenizer(CHINESE, 295))


def test_aquilas_own_ids_stay(aquila_tokenizer_dir: Path, base: Tokenizer) -> None:
    aquila = tokenizer_at(aquila_tokenizer_dir)
    found = extend(aquila, train_tokenizer(["龘龘龘龘 齉齉齉齉"] * 4, 270))
    assert found.vocab_size > aquila.vocab_size == 100008
    assert (found.bos, found.eod) == (100006, 100007)
    assert found.encode("这是一个测试") == [15128, 5744]
    assert max(found.encode("龘龘")) >= 100008
    data = bytes(range(256)) * 2
    assert aquila.decode_bytes(aquila.encode_bytes(data)) == data


def test_what_cannot_be_merged(base: Tokenizer, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    other = LibraryTokenizer(kind="HuggingFaceTokenizer", model=words, bos_token=None, eod_token=None, pad_token=None)
    assert other.unknown == 1
    with pytest.raises(DataError, match="what is added is no byte-level BPE: WordLevel"):
        extend(base, other)
    with pytest.raises(DataError, match="0x80 is no text, and this tokenizer has no token for it"):
        other.encode_bytes(b"\x80")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="the tokenizer cannot be written"):
        save_tokenizer(base, tmp_path / "file")
    with pytest.raises(DataError, match=r"there is no tokenizer: no tokenizer.json, tokenizer.model or vocab.json"):
        tokenizer_at(tmp_path / "nowhere")


def test_sentencepiece(tmp_path: Path) -> None:
    base = tokenizer_at(sentencepieces(tmp_path, ENGLISH, 300))
    assert (base.vocab_size, base.unknown, base.bos, base.eod, base.pad) == (300, 0, 1, 2, None)
    texts = ["the sea  of stars", "海", "a\tb</s>", " x"]
    assert [base.decode(ids) for ids in base.encode_batch(texts)] == texts
    assert base.encode("a</s>")[-1] != 2
    allowed = load_tokenizer(
        "SentencePieceTokenizer", tokenizer_model=tmp_path / "300.model", allow_special_tokens=True
    )
    ids = allowed.encode("sea</s>the sea<s>")
    assert (ids.count(2), ids[-1]) == (1, 1)
    assert allowed.decode(ids) == "sea</s>the sea<s>"
    assert base.decode_bytes(base.encode_bytes(b"the\xff\xfe")) == b" the\xff\xfe", "a space goes before every text"
    assert (base.token_bytes(-1), base.token_bytes(300), base.token_id("nothing")) == (b"", b"", None)

    found = extend(base, tokenizer_at(sentencepieces(tmp_path, CHINESE, 295)))
    assert found.vocab_size > 300
    assert [found.token_bytes(n) for n in range(300)] == [base.token_bytes(n) for n in range(300)]
    assert found.encode(ENGLISH[0]) == base.encode(ENGLISH[0])
    assert len(found.encode("海上的星星")) < len(base.encode("海上的星星"))
    pieces = old_pieces(base, found)
    for number in range(300, found.vocab_size):
        assert base.decode_bytes(pieces[number]).strip() == found.token_bytes(number).strip()
    save_tokenizer(found, tmp_path / "out")
    assert tokenizer_at(tmp_path / "out").encode("海上") == found.encode("海上")


def test_sentencepiece_that_normalizes_says_so(tmp_path: Path) -> None:
    plain = sentencepieces(tmp_path, ENGLISH, 300)
    folded = sentencepieces(
        tmp_path, ENGLISH, 299, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )  # fmt: skip
    assert tokenizer_at(plain).normalization == ""  # type: ignore[attr-defined]
    assert "folds compatibility forms, folds runs of spaces" in tokenizer_at(folded).normalization  # type: ignore[attr-defined]
    unigram = tokenizer_at(sentencepieces(tmp_path, ENGLISH, 275, model_type="unigram"))
    with pytest.raises(DataError, match="a BPE model cannot take the pieces of a UNIGRAM model"):
        extend(tokenizer_at(plain), unigram)
    with pytest.raises(DataError, match="a SentencePieceTokenizer cannot take the pieces of a AquilaTokenizer"):
        extend(unigram, train_tokenizer(ENGLISH, 285))


def test_sentencepiece_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencepiece", reason="an extra (spm)")
    (tmp_path / "bad.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a model that sentencepiece can read"):
        tokenizer_at(tmp_path / "bad.model")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        tokenizer_at(tmp_path / "gone.model")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "x.model").touch()
    with pytest.raises(DataError, match=r"pip install 'megatron_aquila\[spm\]'"):
        tokenizer_at(tmp_path / "x.model")
