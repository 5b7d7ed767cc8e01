"""The tokenizer that goes along with converted weights: found, written, and compared with what transformers reads."""

import shutil
from pathlib import Path

from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.data.aquila_tokens import AQUILA_VOCAB_SIZE
from megatron_aquila.data.huggingface_tokenizer import (
    check_aquila_ids,
    check_huggingface_tokenizer,
    save_huggingface_tokenizer,
)
from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.data.tokenizer_extension import save_tokenizer
from megatron_aquila.generate.tokenizers import tokenizer_beside

_TEXTS = ("这是一个测试", "Hello world", "[CLS]你好</s>", "### Human: 你好\n", "def f(x):\n\treturn x  # 1 + 1 = 2\n")


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
