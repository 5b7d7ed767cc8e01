"""tokenizer.json of a SentencePiece model gives its ids, of any text; transformers' own reading of it does not."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from megatron_aquila.data.huggingface_tokenizer import check_huggingface_tokenizer, save_huggingface_tokenizer
from megatron_aquila.data.sentencepiece_library import library_model
from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer, load_sentencepiece, model_messages
from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.data.tokenizer_training import train_tokenizer
from megatron_aquila.errors import DataError
from tests.data.sentencepieces import CHINESE, ENGLISH, sentencepieces

MIXED = [*ENGLISH, *CHINESE]
UNIGRAM = {"model_type": "unigram"}
FOLDS = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
NO_BYTES = {"byte_fallback": False, "size": 60}
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "no space before a text": {"add_dummy_prefix": False},
    "other special tokens": {"bos_id": -1, "pad_id": 3, "eos_id": 1, "control_symbols": ["<x>"]},
    "folds": FOLDS,
    "unigram": UNIGRAM,
    "unigram that folds": UNIGRAM | FOLDS,
    "symbols of its own": {"user_defined_symbols": ["sea", "<sep>", "sea of"]},
    "unigram with symbols": UNIGRAM | {"user_defined_symbols": ["sea", "<sep>"]},
    "no bytes": NO_BYTES,
    "no bytes, with symbols": NO_BYTES | {"user_defined_symbols": ["sea"]},
    "unigram without bytes": UNIGRAM | {"byte_fallback": False, "size": 45},
    "a piece across the first place of bytes' names": UNIGRAM | {"user_defined_symbols": ["<0"]},
}
WORDS = (
    "the", " ", "  ", "sea", "sea of", "海上", "的", "\n", "\t", "x", "Ａ①", "stars of", "龘", "\u200b", "e\u0301",
    "<sep>", "\u2581", "12", "</s>", "<x>", "<s>", "<unk>", "<0x0A>", "<0", "unknown piece",
)  # fmt: skip


def model(folder: Path, **settings: Any) -> SentencePieceTokenizer:
    return load_sentencepiece(
        sentencepieces(folder, MIXED, settings.pop("size", 300), hard_vocab_limit=False, **settings)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_the_models(tmp_path: Path, kind: str) -> None:
    """Special tokens are recognised in a text, as transformers does it."""
    ours = replace(model(tmp_path, **KINDS[kind]), allow_special_tokens=True)
    theirs = library_model(ours)
    others = {ours.unknown, *theirs.get_added_tokens_decoder()}
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choice(WORDS) for _ in range(draw.randrange(9)))
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        if others.isdisjoint(ids):  # of which each library says something else, or around which it drops spaces
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids), text


def test_what_tokenizer_json_cannot_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = model(tmp_path, model_type="word", byte_fallback=False, size=20)
    with pytest.raises(DataError, match="has no word for a SentencePiece model of type WORD; only BPE and UNIGRAM"):
        library_model(words)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(DataError, match=r"protobuf is not installed: pip install 'megatron_aquila\[spm\]'"):
        library_model(words)


def test_as_many_special_tokens_as_a_text_may_have(tmp_path: Path) -> None:
    plain = model(tmp_path)
    ours = replace(plain, allow_special_tokens=True)
    assert ours.encode("the</s>" * 5000) == [*plain.encode("the"), ours.eod] * 5000
    without = replace(model(tmp_path, bos_id=-1, eos_id=-1), allow_special_tokens=True)
    assert without.encode("the sea") == replace(without, allow_special_tokens=False).encode("the sea") != []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treat_whitespace_as_suffix": True}, r"with spaces behind words \(treat_whitespace_as_suffix\)"),
        ({"escape_whitespaces": False}, r"that keeps spaces as they are \(escape_whitespaces=False\)"),
        ({"unused": True}, "with pieces of type UNUSED"),
    ],
)
def test_settings_that_it_cannot_say(tmp_path: Path, settings: dict[str, bool], message: str) -> None:
    plain = model(tmp_path)
    pb2 = model_messages()
    proto = pb2.ModelProto.FromString(plain.proto)
    for name, value in settings.items():
        if name == "unused":
            proto.pieces[-1].type = pb2.ModelProto.SentencePiece.UNUSED
        else:
            spec = proto.normalizer_spec if name == "escape_whitespaces" else proto.trainer_spec
            setattr(spec, name, value)
    with pytest.raises(DataError, match=f"has no word for a SentencePiece model {message}"):
        library_model(replace(plain, proto=proto.SerializeToString()))


def test_transformers_reads_it_so(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    ours = model(tmp_path)
    texts = ("the sea", "  the sea", "海上</s>", "")
    for config in ({"model_type": "llama"}, {"model_type": "baichuan", "auto_map": {"AutoConfig": "x.X"}}, {"dim": 8}):
        folder = tmp_path / str(config.get("model_type"))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_huggingface_tokenizer(ours, folder, max_length=48)
        check_huggingface_tokenizer(ours, folder, texts)
        assert transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False).model_max_length == 48
    (folder / "tokenizer.json").unlink()
    for settings in ({}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}):
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"} | settings))
        with pytest.raises(DataError, match="through transformers the ids of"):
            check_huggingface_tokenizer(ours, folder, texts)


def test_nothing_is_put_around_a_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    trained = train_tokenizer(ENGLISH, 285)
    described = tokenizers.Tokenizer.from_str(trained.model.to_str())
    described.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", trained.bos)])
    (tmp_path / "in").mkdir()
    described.save(str(tmp_path / "in/tokenizer.json"))
    ours = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path / "in")
    save_huggingface_tokenizer(ours, tmp_path)
    check_huggingface_tokenizer(ours, tmp_path, ["the sea"])
    assert described.encode("the sea").ids[0] == trained.bos, "the file that is read does"
