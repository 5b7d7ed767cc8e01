"""Scripts for ``preprocess_data.py`` run as they are, or are told what to change."""

import re
from pathlib import Path
from typing import get_args

import pytest

from megatron_aquila.commands import preprocess
from megatron_aquila.commands.megatron_preprocess import (
    MEANINGS,
    TOKENIZERS,
    Accepted,
    Refused,
    table,
    without_megatrons,
)
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.tokenizer import TokenizerType
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer
from megatron_aquila.errors import ConfigError


def test_a_script_of_megatrons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: what needs nothing is accepted, all that is refused is named at once."""
    save_tokenizer_files(train_tokenizer([], 265), tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    files = {"vocab-file": "vocab.json", "merge-file": "merges.txt", "special-tokens-file": "special_tokens.txt"}
    script = ["--tokenizer-type=AquilaTokenizerFS", *(f"--{flag}={tmp_path / name}" for flag, name in files.items())]
    script += [
        "--input",
        f"{tmp_path}/in.jsonl",
        "--partitions",
        "2",
        "--keep-sequential-samples",
        "--dataset_impl=mmap",
    ]
    script += ["--workers", "1", "--output-prefix", f"{tmp_path}/out", "--vocab-extra-ids", "0", "--append-eod"]
    assert preprocess.main(script) == 0, capsys.readouterr().err
    assert len(IndexedDataset(tmp_path / "out_text_document")) == 1
    assert preprocess.main([*script, "--split-sentences", "--lang", "german", "--dataset-impl", "lazy"]) == 2
    printed = capsys.readouterr().err
    assert "--split-sentences: a document is one sequence" in printed
    assert "--dataset-impl lazy: mmap's is the one format; use mmap or leave it out" in printed
    assert "--lang" not in printed


def test_every_flag_is_taken_or_refused() -> None:
    before, behind = ["--input", "-", "b"], ["--json-keys", "a=b", "c", "--append-eod"]
    for flag, meaning in MEANINGS.items():
        for words in ([flag, "x"], [f"{flag.replace('-', '_').replace('__', '--')}=x"]):
            script = [*before, *words, *behind]
            if isinstance(meaning, Refused) or (isinstance(meaning, Accepted) and meaning.values):
                with pytest.raises(ConfigError, match=rf"{re.escape(words[0].partition('=')[0])} x: "):
                    without_megatrons(script)
            elif isinstance(meaning, Accepted):
                assert without_megatrons(script) == before + behind
            else:
                assert without_megatrons(script) == [*before, meaning.name, "x", *behind]
    untouched = ["stray", "--input=a", "b", "--help", "--tokenizer-type", "SentencePieceTokenizer"]
    assert without_megatrons(untouched) == untouched
    assert without_megatrons([]) == []


def test_every_tokenizer_is_taken_or_refused() -> None:
    for kind, meaning in TOKENIZERS.items():
        for words in (["--tokenizer-type", kind], [f"--tokenizer_type={kind}"]):
            if isinstance(meaning, Refused):
                with pytest.raises(ConfigError, match=rf"{kind}: .*; {re.escape(meaning.way_out)}"):
                    without_megatrons([*words, "--append-eod"])
            else:
                assert meaning.name in get_args(TokenizerType)
                assert without_megatrons([*words, "--append-eod"]) == ["--tokenizer-type", meaning.name, "--append-eod"]
    assert set(TOKENIZERS).isdisjoint(get_args(TokenizerType))


def test_no_flag_of_the_commands_own_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        preprocess.main(["--help"])
    assert set(re.findall(r"--[a-z-]+", capsys.readouterr().out)).isdisjoint(MEANINGS)


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert table() in page, "print(megatron_preprocess.table()) into docs/data.md"
