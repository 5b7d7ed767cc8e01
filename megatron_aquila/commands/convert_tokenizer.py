"""The tokenizer that goes along with converted weights: found, written, and compared with what transformers reads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.data.huggingface_tokenizer import (
    check_aquila_ids,
    check_huggingface_tokenizer,
    save_huggingface_tokenizer,
)
from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_aquila.data.tokenizer import AQUILA_VOCAB_SIZE, Tokenizer, fingerprint, load_tokenizer, tokenizer_at
from megatron_aquila.data.tokenizer_extension import save_tokenizer
from megatron_aquila.errors import CheckpointError
from megatron_aquila.generate.source import kind_of, tokenizer_beside

_TEXTS = ("这是一个测试", "Hello world", "[CLS]你好</s>", "### Human: 你好\n", "def f(x):\n\treturn x  # 1 + 1 = 2\n")
_GIVE_FILES = "give --tokenizer-model, or --vocab-file, --merge-file and --special-tokens-file"


def open_tokenizer(source: Path, reader: TensorReader, given: Mapping[str, Path | None]) -> Tokenizer:
    """The tokenizer whose files are given, else the one that the checkpoint names, else the one that lies beside it.

    Raises CheckpointError when none of them is there, or they are another tokenizer than the run's, DataError when they
    are no tokenizer.
    """
    saved: Any = reader.state.get("tokenizer") if isinstance(reader, CheckpointReader) else None
    if any(path is not None for path in given.values()):
        kind = kind_of(given["tokenizer_model"])
    elif isinstance(saved, Mapping) and any(saved[name] is not None for name in given):
        kind, given = (
            saved["tokenizer_type"],
            {name: None if saved[name] is None else Path(saved[name]) for name in given},
        )
    elif (folder := tokenizer_beside(reader)) is not None:
        return tokenizer_at(folder)
    else:
        way_out = f"{_GIVE_FILES}, or --no-tokenizer to write the weights alone"
        raise CheckpointError(f"{source}: it names no tokenizer, and none lies beside it; {way_out}")
    missing = [str(path) for path in given.values() if path is not None and not path.exists()]
    if missing:
        raise CheckpointError(f"{source}: its tokenizer's {', '.join(missing)} is not there; {_GIVE_FILES}")
    tokenizer = load_tokenizer(
        kind,
        vocab_file=given["vocab_file"],
        merge_file=given["merge_file"],
        special_tokens_file=given["special_tokens_file"],
        tokenizer_model=given["tokenizer_model"],
    )
    expected = saved.get("fingerprint") if isinstance(saved, Mapping) else None
    if expected is not None and fingerprint(tokenizer) != expected:
        paths = ", ".join(str(path) for path in given.values() if path is not None)
        raise CheckpointError(
            f"{source}: {paths}: not the tokenizer that the run was trained with: the fingerprint is "
            f"{fingerprint(tokenizer)[:12]}, not {str(expected)[:12]}; {_GIVE_FILES} as they were"
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Beside weights: as transformers reads it, or the SentencePiece model. Raises DataError where it cannot be."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        save_tokenizer(tokenizer, folder)
    else:
        save_huggingface_tokenizer(tokenizer, folder, max_length=max_length)


def copy_tokenizer(reader: TensorReader, folder: Path) -> None:
    """Tokenizer files beside the weights that were read, to those written. Raises OSError."""
    source = tokenizer_beside(reader)
    for pattern in ("tokenizer*", "special_tokens*", "vocab.json", "merges.txt", "*.model"):
        for path in (reader.folder if source is None else source).glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def compare_ids(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> str:
    """Hold transformers' ids of some texts against ours; a line on it.

    A model or tokenizer of Aquila's size must also have Aquila's ids. Raises DataError where they differ.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return "tokenizer.model is the tokenizer itself"
    check_huggingface_tokenizer(tokenizer, folder, _TEXTS)
    if AQUILA_VOCAB_SIZE in (vocab_size, tokenizer.vocab_size):
        check_aquila_ids(folder)
    return "token ids are equal"
