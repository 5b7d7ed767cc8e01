"""What transformers makes of a saved tokenizer: the same ids, or an error."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_aquila.data.aquila_tokens import AQUILA_GOLDEN_IDS, AQUILA_SPECIAL_TOKENS
from megatron_aquila.data.huggingface_tokenizer import (
    check_aquila_ids,
    check_huggingface_tokenizer,
    save_huggingface_tokenizer,
)
from megatron_aquila.data.tokenizer import Tokenizer, load_tokenizer
from megatron_aquila.errors import DataError

transformers = pytest.importorskip("transformers")
TEXTS = ["Hello  world, don't\n", "这是一个测试。", "[CLS]你好</s>", "<|endoftext|>", ""]


def aquila(files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("AquilaTokenizer", **files)


@pytest.fixture
def folder(tokenizer_files: dict[str, Path], tmp_path: Path) -> Path:
    # As in an exported checkpoint, where AutoTokenizer might choose a class by the model's type.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_huggingface_tokenizer(aquila(tokenizer_files), tmp_path, max_length=2048)
    return tmp_path


def test_transformers_gives_the_same_ids(tokenizer_files: dict[str, Path], folder: Path) -> None:
    check_huggingface_tokenizer(aquila(tokenizer_files), folder, TEXTS)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert theirs.model_max_length == 2048
    assert load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder).eod == 4103


def test_aquilas_own(aquila_tokenizer_dir: Path, tmp_path: Path) -> None:
    files = {
        "vocab_file": aquila_tokenizer_dir / "vocab.json",
        "merge_file": aquila_tokenizer_dir / "merges.txt",
        "special_tokens_file": aquila_tokenizer_dir / "special_tokens.txt",
    }
    save_huggingface_tokenizer(aquila(files), tmp_path)
    check_huggingface_tokenizer(aquila(files), tmp_path, TEXTS)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs("[CLS]你好</s>")["input_ids"] == [100006, 34856, 100007]
    assert len(theirs) == 100008
    check_aquila_ids(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "ids", "message"),
    [
        ({"[CLS]": 100001}, {}, r"\[CLS\] has the id 100001, not 100006.*--no-verify"),
        ({}, {"Hello world": [22299]}, r"'Hello world' has the ids \[22299\], not \[22299, 3117\]"),
        ({}, {}, None),
    ],
)
def test_ids_that_are_not_aquilas(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: dict[str, int],
    ids: dict[str, list[int]],
    message: str | None,
) -> None:
    """What transformers answers is replaced, so that this needs no file of Aquila's."""
    right = {token: 100000 + place for place, token in enumerate(AQUILA_SPECIAL_TOKENS)} | tokens
    golden = {text: list(expected) for text, expected in AQUILA_GOLDEN_IDS.items()} | ids

    class Theirs:
        convert_tokens_to_ids = staticmethod(right.__getitem__)

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": golden[text]}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Theirs())
    if message is None:
        check_aquila_ids(tmp_path)
    else:
        with pytest.raises(DataError, match=message):
            check_aquila_ids(tmp_path)


def swap_specials(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"[CLS]"', '"swap"').replace('"</s>"', '"[CLS]"').replace('"swap"', '"</s>"')
    )


def split_otherwise(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true', 1))


def rename_end(folder: Path) -> None:
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        path.write_text(path.read_text().replace('"eos_token": "</s>"', '"eos_token": "[CLS]"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_specials, "through transformers the bos_token_id is 4103, not 4102"),
        (split_otherwise, 'through transformers the ids of "Hello'),
        (rename_end, "through transformers the eos_token_id is 4102, not 4103"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "transformers cannot load the tokenizer"),
    ],
)
def test_other_ids_are_refused(
    tokenizer_files: dict[str, Path], folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        check_huggingface_tokenizer(aquila(tokenizer_files), folder, TEXTS)


def test_without_transformers(tokenizer_files: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match="transformers is not installed"):
        check_huggingface_tokenizer(aquila(tokenizer_files), folder, TEXTS)


def test_a_folder_that_is_not_there(tokenizer_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: the tokenizer cannot be written"):
        save_huggingface_tokenizer(aquila(tokenizer_files), tmp_path / "nowhere")
