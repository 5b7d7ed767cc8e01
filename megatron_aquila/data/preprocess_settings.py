"""What ``data.preprocess`` is told: what to tokenize, how and to where."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_aquila.data.encoders import Backend
from megatron_aquila.data.filters import LengthLimits
from megatron_aquila.data.inputs import InputFormat, TextDocuments
from megatron_aquila.data.records import ReadOptions
from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import ConfigError, Problem

Engine = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessSettings:
    """What to tokenize, how and to where; ``data.inputs`` and ``data.records`` say what can be read.

    ``shard`` is ``(i, n)``: only the i-th (from 0) of n parts of the corpus, into ``PREFIX_shard<i>of<n>``; joined in
    their order they are the whole. ``engine`` ``ray`` gives the pieces to a Ray cluster instead of ``workers``
    processes of this machine. ``limits`` and ``deduplicate`` leave documents out before they are tokens; of documents
    whose texts are equal the first of this output is kept.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    read: ReadOptions = field(default_factory=ReadOptions)
    input_format: InputFormat = "auto"
    text_documents: TextDocuments = "file"
    append_eod: bool = False
    skip_bad_lines: bool = False
    limits: LengthLimits = field(default_factory=LengthLimits)
    deduplicate: bool = False
    backend: Backend = "auto"
    workers: int = 1
    engine: Engine = "local"
    shard: tuple[int, int] | None = None
    overwrite: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that make data sets; of a template, ``text``."""
        return self.read.keys if self.read.template is None else ("text",)

    @property
    def prefix(self) -> str:
        """Of this shard's data sets."""
        if self.shard is None:
            return self.output_prefix
        return f"{self.output_prefix}_shard{self.shard[0]:05d}of{self.shard[1]:05d}"


def check_settings(settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
    """Refuse settings that make no sense, before anything is read or written.

    Raises:
        ConfigError: with every problem.
    """
    problems = settings.limits.problems()
    keys = settings.read.keys
    if len(keys) == 0 or len(set(keys)) < len(keys):
        problems.append(Problem("--json-keys", " ".join(keys), "each key makes a data set", "name each key once"))
    for key in keys:
        if "/" in key:
            why = "the key is a part of its data set's name, in which / would part folders"
            problems.append(
                Problem("--json-keys", key, why, f"use --text-template '{{{key}}}', which makes text of it")
            )
    if settings.read.max_document_bytes < 1:
        why = "no record is as short as that"
        problems.append(Problem("--max-document-bytes", settings.read.max_document_bytes, why, "use 1 or more"))
    if settings.read.template is not None and keys != ("text",):
        why = "the texts are the --text-template's, which makes one data set of the name text"
        problems.append(Problem("--json-keys", " ".join(keys), why, "give one of the two"))
    if settings.workers < 1:
        problems.append(Problem("--workers", settings.workers, "somebody has to work", "use 1 or more"))
    if settings.append_eod and tokenizer.eod is None:
        why = "the tokenizer has no end-of-document token"
        problems.append(Problem("--append-eod", "", why, "name an eos_token in tokenizer_config.json"))
    if settings.shard is not None and not 0 <= settings.shard[0] < settings.shard[1]:
        index, count = settings.shard
        why = f"shards are numbered from 0 to {max(count - 1, 0)}"
        problems.append(Problem("--shard", f"{index}/{count}", why, "use I/N with 0 <= I < N"))
    if problems:
        raise ConfigError(problems)
