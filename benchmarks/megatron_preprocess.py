"""``python -m benchmarks.megatron_preprocess``: text to token files the way of Megatron-LM's preprocess_data.py.

megatron-core brings its builder of data sets and not its tool, whose way is repeated here: a pool of processes, to each
of which the main process hands lines, 32 at a time; Hugging Face's tokenizer, called once a document; the main process
writes.
"""

import json
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import options_of

LINES = 32  # handed to a process at once


@dataclass(frozen=True, kw_only=True)
class Options:
    """A corpus of JSON lines and where its data set goes."""

    input: Path
    """The corpus."""
    output: Path
    """Prefix of the .bin and .idx."""
    tokenizer: Path
    """tokenizer.json."""
    eod: int
    """Id of the token that ends each document."""
    vocab_size: int
    """Which decides the type of the tokens."""
    workers: int
    """Processes that tokenize."""


class Encoder:
    """Tokenizes lines in the processes of a pool, each with a tokenizer of its own."""

    tokenizer: ClassVar[Any] = None

    def __init__(self, options: Options) -> None:
        self._options = options

    def start(self) -> None:
        """Make this process's tokenizer."""
        from transformers import PreTrainedTokenizerFast

        make: Any = PreTrainedTokenizerFast  # it has no types
        Encoder.tokenizer = make(tokenizer_file=str(self._options.tokenizer))

    def encode(self, line: str) -> list[int]:
        """The ids of a line's text, and the end of the document; nothing for an empty text."""
        ids: list[int] = self.tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
        return [*ids, self._options.eod] if ids else []


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data set; returns the exit status."""
    options = options_of(Options, "megatron_preprocess", argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not there
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    dtype = DType.optimal_dtype(options.vocab_size)
    builder = IndexedDatasetBuilder(f"{options.output}.bin", dtype=dtype)
    encoder = Encoder(options)
    with (
        options.input.open(encoding="utf-8") as file,
        multiprocessing.Pool(options.workers, initializer=encoder.start) as pool,
    ):
        for ids in pool.imap(encoder.encode, file, LINES):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{options.output}.idx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
