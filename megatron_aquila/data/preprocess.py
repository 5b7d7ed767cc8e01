"""Text to tokens on disk: JSON lines in, one ``PREFIX_KEY_document`` data set out for each key."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.indexed import IndexedDatasetWriter, token_dtype
from megatron_aquila.data.jsonl import BadLine, LineBlock, parse_block, read_blocks
from megatron_aquila.data.manifest import Origin, SourceFile, package_versions
from megatron_aquila.data.tokenizer import Tokenizer, tokenizer_facts
from megatron_aquila.data.workers import ordered_map
from megatron_aquila.errors import ConfigError, DataError, Problem

NAMED: Final = 20  # bad lines that are kept by name when they are skipped


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block's documents: for each key all tokens end to end, and the tokens of each document."""

    path: Path
    position: int
    num_bytes: int
    tokens: list[NDArray[Any]]
    lengths: list[NDArray[np.int64]]
    bad: list[BadLine]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """Parses and tokenizes a block of lines; sent to each worker once. An empty text gets no end of document."""

    tokenizer: Tokenizer
    keys: Sequence[str]
    append_eod: bool
    dtype: np.dtype[Any]

    def __call__(self, block: LineBlock) -> EncodedBlock:
        """Every good line of the block as tokens."""
        documents = parse_block(block, self.keys)
        end = [self.tokenizer.eod] if self.append_eod else []
        tokens, lengths = [], []
        for column in range(len(self.keys)):
            encoded = self.tokenizer.encode_batch([texts[column] for texts in documents.texts])
            ended = [ids + end if len(ids) > 0 else ids for ids in encoded]
            lengths.append(np.array([len(ids) for ids in ended], dtype=np.int64))
            tokens.append(np.fromiter(chain.from_iterable(ended), dtype=self.dtype))
        num_bytes = sum(map(len, block.lines))
        return EncodedBlock(block.path, block.position, num_bytes, tokens, lengths, documents.bad)


@dataclass(slots=True)
class Progress:
    """What was done so far; ``position`` is how many bytes of ``path`` were read."""

    path: Path = Path()
    position: int = 0
    num_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    bad_lines: int = 0
    named_bad_lines: list[BadLine] = field(default_factory=list)

    def add(self, block: EncodedBlock) -> None:
        """Count a block."""
        self.path, self.position = block.path, block.position
        self.num_bytes += block.num_bytes
        self.documents += len(block.lengths[0])
        self.tokens += sum(len(tokens) for tokens in block.tokens)
        self.bad_lines += len(block.bad)
        self.named_bad_lines += block.bad[: NAMED - len(self.named_bad_lines)]


def preprocess(
    inputs: Sequence[Path],
    output_prefix: str,
    *,
    tokenizer: Tokenizer,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
    skip_bad_lines: bool,
    report: Callable[[Progress], None],
) -> Progress:
    """Tokenize files into ``<output_prefix>_<key>_document.bin`` and ``.idx``, in order, in bounded memory.

    The output does not depend on ``workers``, and appears under its final names only when all of it is written. A
    manifest beside each pair then says what made it.
    ``report`` is called after each block, of about a megabyte of lines.

    Raises:
        ConfigError: the keys repeat, ``workers`` is not positive, or the tokenizer has no end-of-document token.
        DataError: a file cannot be read or written, a line is bad and ``skip_bad_lines`` is not set, there is no
            document at all, or a worker died. Nothing is left under the final names then.
    """
    _check(tokenizer, keys, append_eod, workers)
    done = Progress()
    dtype = token_dtype(tokenizer.vocab_size)
    encoder = Encoder(tokenizer=tokenizer, keys=tuple(keys), append_eod=append_eod, dtype=dtype)
    with ExitStack() as stack:
        prefixes = document_prefixes(output_prefix, keys)
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix in prefixes]
        for block in ordered_map(encoder, _all_blocks(inputs), workers=workers):
            if block.bad and not skip_bad_lines:
                raise DataError(f"{block.bad[0]}; mend the line, or leave such lines out with --on-bad-line skip")
            for writer, tokens, lengths in zip(writers, block.tokens, block.lengths, strict=True):
                writer.add_documents(tokens, lengths)
            done.add(block)
            report(done)
        if done.documents == 0:
            raise DataError(f"{', '.join(map(str, inputs))}: no document found, {done.bad_lines} bad lines")
        for key, writer in zip(keys, writers, strict=True):
            writer.origin = Origin(
                tokenizer=tokenizer_facts(tokenizer),
                sources=tuple(SourceFile(path=str(path), size=path.stat().st_size) for path in inputs),
                options={"json_key": key, "append_eod": append_eod, "bad_lines_skipped": done.bad_lines},
                versions=package_versions("numpy", "tokenizers"),
            )
    return done


def document_prefixes(output_prefix: str, keys: Sequence[str]) -> list[str]:
    """The prefix of each key's data set, as Megatron-LM names them."""
    return [f"{output_prefix}_{key}_document" for key in keys]


def _check(tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool, workers: int) -> None:
    problems = []
    if len(keys) == 0 or len(set(keys)) < len(keys):
        problems.append(Problem("--json-keys", " ".join(keys), "each key makes a data set", "name each key once"))
    if workers < 1:
        problems.append(Problem("--workers", workers, "somebody has to work", "use 1 or more"))
    if append_eod and tokenizer.eod is None:
        why = "the tokenizer has no end-of-document token"
        problems.append(Problem("--append-eod", "", why, "name an eos_token in tokenizer_config.json"))
    if problems:
        raise ConfigError(problems)


def _all_blocks(inputs: Sequence[Path]) -> Iterator[LineBlock]:
    for path in inputs:
        yield from read_blocks(path)
