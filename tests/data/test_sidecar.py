"""A data set says by which tokenizer it was made, and another one is refused."""

import json
from pathlib import Path

import pytest

from megatron_aquila.data.sidecar import check_fingerprint, remove_sidecar, write_sidecar
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.errors import DataError


@pytest.fixture
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("AquilaTokenizer", **tokenizer_files)  # type: ignore[arg-type]


def test_what_it_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_sidecar(tmp_path / "data", tokenizer, documents=3, tokens=5)
    assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8")) == {
        "tokenizer_type": "AquilaTokenizer",
        "vocab_size": 4104,
        "fingerprint": fingerprint(tokenizer),
        "documents": 3,
        "tokens": 5,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_sidecar(tmp_path / "data", tokenizer, documents=3, tokens=5)
    prefixes = [str(tmp_path / name) for name in ("of_another_program", "data")]
    check_fingerprint(prefixes, fingerprint(tokenizer))
    with pytest.raises(DataError, match=r"data: it was tokenized by another tokenizer.*4104 tokens.*data.json.*again"):
        check_fingerprint(prefixes, "0" * 64)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fingerprint": 1}'])
def test_a_sidecar_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"data.json: .*; remove it"):
        check_fingerprint([str(tmp_path / "data")], "0" * 64)


def test_a_sidecar_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "data.json").mkdir()
    with pytest.raises(DataError, match=r"data.json: cannot be written: Is a directory"):
        write_sidecar(tmp_path / "data", tokenizer, documents=3, tokens=5)
    with pytest.raises(DataError, match=r"data.json: cannot be replaced: "):
        remove_sidecar(tmp_path / "data")
    with pytest.raises(DataError, match=r"data.json: cannot be read: Is a directory; remove it"):
        check_fingerprint([str(tmp_path / "data")], "0" * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
