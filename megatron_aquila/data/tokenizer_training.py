"""Train a byte-level BPE with Aquila's layout of ids: ``<|endoftext|>`` 0, the bytes 1 to 256, merges, specials."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_aquila.data.aquila_tokens import AQUILA_SPECIAL_TOKENS, PAD
from megatron_aquila.data.huggingface_tokenizer import huggingface_files
from megatron_aquila.data.tokenizer import Tokenizer, aquila_tokenizer, build_aquila_tokenizer, library_of
from megatron_aquila.errors import DataError

SMALLEST: Final = 1 + 256 + len(AQUILA_SPECIAL_TOKENS)
BATCH: Final = 256  # texts encoded at once


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly ``vocab_size`` ids, a function of the texts and their order alone.

    Memory grows with the number of different words, about 16 bytes a byte of text.

    Raises:
        DataError: ``vocab_size`` has no room for the bytes and special tokens, or the texts give too few merges.
    """
    if vocab_size < SMALLEST:
        raise DataError(f"--vocab-size {vocab_size}: bytes and special tokens alone take {SMALLEST}")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(AQUILA_SPECIAL_TOKENS),
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    learned = len(model["vocab"]) + len(AQUILA_SPECIAL_TOKENS)
    if learned < vocab_size:
        raise DataError(f"--vocab-size {vocab_size}: the texts give only {learned} tokens; ask for that many or fewer")
    merges = [(left, right) for left, right in model["merges"]]
    return aquila_tokenizer(build_aquila_tokenizer(model["vocab"], merges))


def save_tokenizer_files(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write the files of ``save_huggingface_tokenizer``, and vocab.json, merges.txt and special_tokens.txt as Aquila's.

    They are written into a temporary folder beside ``out_dir`` and get their names when all of them are whole. What
    else is in ``out_dir`` stays.

    Raises:
        DataError: the folder cannot be made or written; it is as it was then.
    """
    model = library_of(tokenizer).description["model"]
    merges = [f"{left} {right}" for left, right in model["merges"]]
    files = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens.txt": "\n".join([*AQUILA_SPECIAL_TOKENS, ""]),
        **huggingface_files(tokenizer),
    }
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{out_dir.name}.", suffix=".tmp", dir=out_dir.parent) as temporary:
            for name, text in files.items():
                (Path(temporary) / name).write_text(text, encoding="utf-8")
            out_dir.mkdir(exist_ok=True)
            for name in files:
                (Path(temporary) / name).replace(out_dir / name)
    except OSError as error:
        raise DataError(f"{out_dir}: the tokenizer cannot be written: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Density:
    """How many tokens a tokenizer takes for some documents."""

    documents: int
    tokens: int
    num_bytes: int

    @property
    def mean_tokens(self) -> float:
        """Tokens per document; 0 without documents."""
        return self.tokens / max(self.documents, 1)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that one token stands for; 0 without tokens."""
        return self.num_bytes / max(self.tokens, 1)


def measure_density(tokenizer: Tokenizer, texts: Iterable[str]) -> Density:
    """Encode every text and count."""
    documents = tokens = num_bytes = 0
    for batch in _batches(texts):
        documents += len(batch)
        tokens += sum(len(ids) for ids in tokenizer.encode_batch(batch))
        num_bytes += sum(len(text.encode("utf-8")) for text in batch)
    return Density(documents, tokens, num_bytes)


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch
