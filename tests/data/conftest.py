"""Megatron-LM's own files are small enough to live beside these tests: a plain clone checks conformance."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_aquila.data.aquila_tokens import AQUILA_SPECIAL_TOKENS, PAD


@pytest.fixture(scope="session")
def megatron_fixtures() -> Path:
    return Path(os.environ.get("AQUILA_TEST_FIXTURES", Path(__file__).parent / "megatron"))


@pytest.fixture(scope="session")
def tokenizer_files(megatron_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small vocabulary as Aquila's three files and as a bare tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = json.loads((megatron_fixtures / "vocab.json").read_text(encoding="utf-8"))
    merges = json.loads((megatron_fixtures / "merges.json").read_text(encoding="utf-8"))
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "special_tokens.txt").write_text("\n".join([*AQUILA_SPECIAL_TOKENS, ""]), encoding="utf-8")
    bare = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.add_special_tokens([PAD])
    bare.save(str(folder / "tokenizer.json"))
    return {
        "vocab_file": folder / "vocab.json",
        "merge_file": folder / "merges.txt",
        "special_tokens_file": folder / "special_tokens.txt",
        "tokenizer_model": folder / "tokenizer.json",
    }
