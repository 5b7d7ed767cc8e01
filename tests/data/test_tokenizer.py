"""Ids are Aquila's, text stays text, and files that do not fit are refused."""

import hashlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from megatron_aquila.data.aquila_tokens import AQUILA_GOLDEN_IDS, AQUILA_SPECIAL_TOKENS, AQUILA_VOCAB_SIZE
from megatron_aquila.data.tokenizer import _PROBE, LibraryTokenizer, Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.errors import ConfigError, DataError


def test_aquilas_own_ids(aquila_tokenizer_dir: Path) -> None:
    files = {
        "vocab_file": aquila_tokenizer_dir / "vocab.json",
        "merge_file": aquila_tokenizer_dir / "merges.txt",
        "special_tokens_file": aquila_tokenizer_dir / "special_tokens.txt",
    }
    tokenizer = load_tokenizer("AquilaTokenizer", **files)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (100008, 100006, 100007, 0)
    assert tokenizer.vocab_size == AQUILA_VOCAB_SIZE
    assert tokenizer.encode_batch(list(AQUILA_GOLDEN_IDS)) == [list(ids) for ids in AQUILA_GOLDEN_IDS.values()]
    for text, ids in AQUILA_GOLDEN_IDS.items():
        assert tokenizer.decode(ids) == text
    assert max(tokenizer.encode("[CLS]你好</s>")) < 100000
    allowed = replace(tokenizer, allow_special_tokens=True)
    assert allowed.encode("[CLS]你好</s>") == [100006, 34856, 100007]
    assert [allowed.encode(token) for token in AQUILA_SPECIAL_TOKENS] == [[number] for number in range(100000, 100008)]


def small(files: dict[str, Path], **changes: Path | None) -> Tokenizer:
    return load_tokenizer("AquilaTokenizer", **(files | changes))  # type: ignore[arg-type]


def test_special_tokens_come_last_and_text_is_text(tokenizer_files: dict[str, Path]) -> None:
    tokenizer = small(tokenizer_files)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (4104, 4102, 4103, 0)
    text = "a</s>b<|endoftext|>[CLS]"
    ids = tokenizer.encode(text)
    assert not {0, 4102, 4103} & set(ids)
    assert tokenizer.decode(ids) == text
    allowed = load_tokenizer("AquilaTokenizer", **tokenizer_files, allow_special_tokens=True).encode(text)
    assert [number for number in allowed if number in (0, 4102, 4103)] == [4103, 0, 4102]


def test_what_is_known_of_aquilas_own_is_what_the_library_says(tokenizer_files: dict[str, Path]) -> None:
    tokenizer = load_tokenizer("AquilaTokenizer", **tokenizer_files)  # type: ignore[arg-type]
    assert isinstance(tokenizer, LibraryTokenizer)
    known = {**vars(tokenizer)}["description"]
    said = json.loads(tokenizer.model.to_str())
    assert json.loads(json.dumps(known)) == said
    assert pickle.loads(pickle.dumps(tokenizer)).description == said


def test_a_tokenizer_json(tokenizer_files: dict[str, Path], tmp_path: Path) -> None:
    path = tokenizer_files["tokenizer_model"]
    bare = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=path)
    assert (bare.vocab_size, bare.bos, bare.eod, bare.pad) == (4096, None, 0, None)
    assert bare.encode("甜水 sea") == small(tokenizer_files).encode("甜水 sea")
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    config = {"bos_token": {"content": "!"}, "eos_token": '"', "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)
    assert (named.bos, named.eod, named.pad) == (1, 2, None)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path).eod is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match=r"tokenizer_config.json: \['</s>'\] are not in .*tokenizer.json"):
        load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)


def test_flags_that_are_missing() -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-model .*HuggingFaceTokenizer needs it"):
        load_tokenizer("HuggingFaceTokenizer")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("AquilaTokenizer", merge_file=Path("merges.txt"))
    assert [problem.flag for problem in caught.value.problems] == ["--vocab-file", "--special-tokens-file"]


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("vocab_file", None, "cannot be read: No such file"),
        ("vocab_file", "{", "not JSON"),
        ("vocab_file", "[]", "not a JSON object but a list"),
        ("vocab_file", '{"<|endoftext|>": 0, "a": 2}', "ids must run from 0 without a gap"),
        ("vocab_file", '{"a": 0, "<|endoftext|>": 1}', "must have id 0"),
        ("vocab_file", '{"<|endoftext|>": 0, "a": "1"}', "without a gap"),
        ("vocab_file", '{"<|endoftext|>": 0, "a": 1}', r"merges.txt does not fit .*vocab.json"),
        ("merge_file", None, "cannot be read: .*No such file"),
        ("merge_file", "#version: 0.2\na b\nab\n", "merges.txt:3: not a merge of two tokens: 'ab'"),
        ("merge_file", "a b c\n", "merges.txt:1: not a merge"),
        ("merge_file", "ab" * 1000, rf"merges.txt:1: not a merge of two tokens: '{'ab' * 40}\.\.\.'; take"),
        ("special_tokens_file", "[CLS]\n", r"not Aquila's special tokens.*expected .*<\|startofpiece\|> .*Hugging"),
        ("special_tokens_file", "\n".join([*AQUILA_SPECIAL_TOKENS, "[NEW]"]), "not Aquila's special tokens"),
        ("special_tokens_file", "\n".join(AQUILA_SPECIAL_TOKENS[::-1]), r"in that order.*found </s> \[CLS\]"),
        ("vocab_file", '{"<|endoftext|>": 0, "[CLS]": 1}', r"vocab.json: it holds \[CLS\], which special_tokens.txt"),
    ],
)
def test_files_that_do_not_fit(
    tokenizer_files: dict[str, Path], tmp_path: Path, flag: str, content: str | None, message: str
) -> None:
    path = tmp_path / tokenizer_files[flag].name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        small(tokenizer_files, **{flag: path})


def test_a_tokenizer_json_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read: No such file"):
        load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json that"):
        load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)


def test_the_fingerprint_is_of_what_makes_ids(tokenizer_files: dict[str, Path], tmp_path: Path) -> None:
    ours = small(tokenizer_files)
    found = fingerprint(ours)
    assert re.fullmatch(r"[0-9a-f]{64}", found)
    assert fingerprint(load_tokenizer("AquilaTokenizer", **tokenizer_files, allow_special_tokens=True)) == found
    ours.model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert fingerprint(load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)) == found
    ours.encode("[CLS]")  # whatever it was used for
    assert fingerprint(ours) == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"!":1,"\\"":2', '"!":2,"\\"":1'),
        ('"[sMASK]"', '"[other]"'),
        ('"add_prefix_space":false', '"add_prefix_space":true'),
        ('["Ġ","Ġ"],["Ġ","t"]', '["Ġ","t"],["Ġ","Ġ"]'),
    ],
)
def test_another_tokenizer_has_another_fingerprint(
    tokenizer_files: dict[str, Path], tmp_path: Path, old: str, new: str
) -> None:
    ours = small(tokenizer_files)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "tokenizer.json").write_text(ours.model.to_str(), encoding="utf-8")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert old in text, f"{old} is not in tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    other = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path)
    assert fingerprint(other) != fingerprint(ours)


def test_the_end_of_a_document_is_in_the_fingerprint(tokenizer_files: dict[str, Path]) -> None:
    ours = small(tokenizer_files)
    assert fingerprint(replace(ours, eod_token="[CLS]")) != fingerprint(ours)


def test_the_fingerprint_is_json_with_sorted_keys(tokenizer_files: dict[str, Path]) -> None:
    ours = small(tokenizer_files)
    model = json.loads(ours.model.to_str())["model"]
    specials = {number: token.content for number, token in ours.model.get_added_tokens_decoder().items()}
    identity = [ours.model.get_vocab(), [], model["merges"], specials, "</s>", ours.encode(_PROBE)]
    assert fingerprint(ours) == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def test_the_vocabulary_is_the_models(tokenizer_files: dict[str, Path]) -> None:
    ours = small(tokenizer_files)
    assert ours.vocab == ours.model.get_vocab()
    model = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0, byte_fallback=False))
    unigram = replace(ours, model=model)
    assert (unigram.vocab, unigram.vocab_size) == ({"a": 0, "b": 1}, 2)


def test_only_the_model_is_pickled(tokenizer_files: dict[str, Path]) -> None:
    ours = small(tokenizer_files)
    size = len(pickle.dumps(ours))
    assert ours.description is ours.description
    assert len(pickle.dumps(ours)) == size
    assert pickle.loads(pickle.dumps(ours)).encode("a b") == ours.encode("a b")
