"""A trained vocabulary has Aquila's layout, is the same every time, and is read back by every door."""

import json
import resource
from pathlib import Path

import pytest

from megatron_aquila.data.aquila_tokens import AQUILA_SPECIAL_TOKENS
from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.data.tokenizer_training import Density, measure_density, save_tokenizer_files, train_tokenizer
from megatron_aquila.errors import DataError


@pytest.fixture(scope="module")
def texts(megatron_fixtures: Path) -> list[str]:
    found: list[str] = json.loads((megatron_fixtures / "tool_input_docs.json").read_text(encoding="utf-8"))
    return found


def test_layout_and_files(texts: list[str], megatron_fixtures: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(texts, 600)
    assert tokenizer.vocab_size == 600
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (598, 599, 0)
    assert [tokenizer.model.token_to_id(token) for token in AQUILA_SPECIAL_TOKENS] == list(range(592, 600))
    save_tokenizer_files(tokenizer, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    files = ["merges.txt", "special_tokens.txt", "special_tokens_map.json"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *files,
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) == 592
    theirs = json.loads((megatron_fixtures / "vocab.json").read_text(encoding="utf-8"))
    first = {token: number for token, number in theirs.items() if number < 257}  # GPT-2's order of the bytes
    assert {token: number for token, number in vocab.items() if number < 257} == first
    three = load_tokenizer(
        "AquilaTokenizer",
        vocab_file=folder / "vocab.json",
        merge_file=folder / "merges.txt",
        special_tokens_file=folder / "special_tokens.txt",
    )
    one = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)
    assert tokenizer.encode_batch(texts) == three.encode_batch(texts) == one.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert (one.bos, one.eod, one.pad) == (598, 599, 0)
    assert train_tokenizer(texts, 600).model.to_str() == tokenizer.model.to_str()


def test_sizes_that_cannot_be(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--vocab-size 264: bytes and special tokens alone take 265"):
        train_tokenizer(texts, 264)
    assert train_tokenizer(["aa aa"], 266).vocab_size == 266
    with pytest.raises(DataError, match=r"--vocab-size 300: the texts give only 26\d tokens"):
        train_tokenizer(["aa aa"], 300)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the tokenizer cannot be written"):
        save_tokenizer_files(train_tokenizer([], 265), tmp_path / "file")


def test_a_full_disk_leaves_the_old_files_or_none(tmp_path: Path, texts: list[str]) -> None:
    small, large = train_tokenizer([], 265), train_tokenizer(texts, 600)
    save_tokenizer_files(small, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # room for vocab.json, not for tokenizer.json
    try:
        for name in ("old", "new"):
            with pytest.raises(DataError, match=rf"{name}: the tokenizer cannot be written: File too large"):
                save_tokenizer_files(large, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    save_tokenizer_files(large, tmp_path / "old")
    (tmp_path / "old" / "notes").write_text("mine")
    save_tokenizer_files(large, tmp_path / "old")
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == sorted([*before, "notes"])
    assert load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path / "old").vocab_size == 600


def test_density() -> None:
    tokenizer = train_tokenizer(["aa aa"], 266)
    assert measure_density(tokenizer, ["aa", "", "é"] * 100) == Density(300, 300, 400)
    assert (Density(300, 300, 400).mean_tokens, Density(300, 300, 400).bytes_per_token) == (1.0, 4 / 3)
    assert (Density(0, 0, 0).mean_tokens, Density(0, 0, 0).bytes_per_token) == (0, 0)
