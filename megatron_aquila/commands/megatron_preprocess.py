"""What ``aquila preprocess`` does not know by Megatron-LM's and FlagScale's names, and what becomes of it.

One table of flags, and of tokenizers, serves the command and ``docs/data.md``. What the command has under the same name
needs no row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from megatron_aquila.errors import Problem, refuse


@dataclass(frozen=True, slots=True)
class Accepted:
    """Nothing has to be done for it, ``why`` says how so; where there are ``values``, only for these."""

    why: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Renamed:
    """Its name here: a flag that takes the same value, or a tokenizer of the same files and ids."""

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Not offered: why, and what to do."""

    why: str
    way_out: str


Meaning = Accepted | Renamed | Refused

_NO_TRIALS = Refused(
    "no trial runs are made", "leave it out: --workers is one a core, and the output is the same for any"
)
_NO_TIKTOKEN = Refused(
    "tiktoken's files are not read", "use --tokenizer-type HuggingFaceTokenizer and a tokenizer.json of the same tokens"
)
_NO_MORE_TOKENS = Refused(
    "special tokens are those of the tokenizer's files", "leave it out; `aquila tokenizer extend` adds tokens"
)
_ONLY_EOD = "no special token is added but by --append-eod"
_NOT_PADDED = Accepted("ids are the tokenizer's own: a run pads its embedding, no data set")
_FILES_SAY = Refused("the tokenizer's files say it", "leave it out; use --tokenizer-type and --tokenizer-model")
_NULL = Refused("there is no tokenizer without text", "leave it out, and name the tokenizer of the text")

MEANINGS: Mapping[str, Meaning] = MappingProxyType(
    {
        "--tokenizer-path": Renamed("--tokenizer-model"),
        "--partitions": Accepted("workers share the whole corpus, and its documents are one data set in their order"),
        "--keep-sequential-samples": Accepted("documents are always in the order of the corpus"),
        "--chunk-size": Accepted("the corpus is cut by its size, and the output does not depend on the cuts"),
        "--dataset-impl": Accepted("mmap's is the one format", ("mmap",)),
        "--keep-newlines": Accepted("text is kept as it is"),
        "--lang": Accepted("documents are not split, so that no language's rules are needed"),
        "--vocab-size": _NOT_PADDED,
        "--padded-vocab-size": _NOT_PADDED,
        "--make-vocab-size-divisible-by": _NOT_PADDED,
        "--vocab-extra-ids": Accepted("no ids are added to the tokenizer's", ("0",)),
        "--extra-vocab-size": Accepted("no ids are added to the tokenizer's", ("0",)),
        "--tokenizer-hf-no-include-special-tokens": Accepted(_ONLY_EOD),
        "--use-gigatoken": Accepted("it is taken where it gives the same ids: --tokenizer-backend"),
        "--split-sentences": Refused(
            "a document is one sequence: sentences of their own are for BERT and T5",
            "leave it out, or split before and give one a line with --input-format text --text-documents line",
        ),
        "--find-optimal-num-workers": _NO_TRIALS,
        "--workers-to-check": _NO_TRIALS,
        "--max-documents": _NO_TRIALS,
        "--performance-dir": _NO_TRIALS,
        "--tiktoken-pattern": _NO_TIKTOKEN,
        "--tiktoken-num-special-tokens": _NO_TIKTOKEN,
        "--tiktoken-special-tokens": _NO_TIKTOKEN,
        "--tokenizer-special-tokens": _NO_MORE_TOKENS,
        "--special-tokens": _NO_MORE_TOKENS,
        "--tokenizer-hf-include-special-tokens": Refused(_ONLY_EOD, "leave it out"),
        "--tokenizer-hf-no-use-fast": Refused("a tokenizer.json is a fast tokenizer's", "leave it out"),
        "--tokenizer-metadata": _FILES_SAY,
        "--tokenizer-sentencepiece-legacy": _FILES_SAY,
        "--trust-remote-code": Refused("code that comes with a tokenizer is not run", "give its tokenizer.json"),
        "--null-tokenizer-eod-id": _NULL,
        "--null-tokenizer-pad-id": _NULL,
    }
)

TYPE: Final = "--tokenizer-type"
_ADDS_TOKENS = "it puts a beginning before each text where its files say so"
_ITS_JSON = Refused(_ADDS_TOKENS, f"use {TYPE} HuggingFaceTokenizer, which adds no token, and its tokenizer.json")
_ITS_MODEL = f"{TYPE} SentencePieceTokenizer and the same .model"
_ITS_OWN_CODE = Refused("its files are not read", _NO_TIKTOKEN.way_out)
_NOT_FOR_TEXT = Refused("it is for no causal model of text", f"use {TYPE} with the tokenizer of the model")

TOKENIZERS: Mapping[str, Renamed | Refused] = MappingProxyType(
    {
        "AquilaTokenizerFS": Renamed("AquilaTokenizer"),
        "HFTokenizerFS": _ITS_JSON,
        "Llama3TokenizerFS": _ITS_JSON,
        "HFTokenizersTokenizerFS": _ITS_JSON,
        "Qwen2TokenizerFS": _ITS_JSON,
        "QwenTokenizerFS": _ITS_OWN_CODE,
        "RWKVTokenizer": _ITS_OWN_CODE,
        "GPT2BPETokenizer": _ITS_OWN_CODE,
        "TikTokenizer": _NO_TIKTOKEN,
        "GPTSentencePieceTokenizer": Refused("one name for each kind of files", f"use {_ITS_MODEL}"),
        "Llama2Tokenizer": Refused("it puts a beginning before each text", f"use {_ITS_MODEL}: no token is added"),
        "NullTokenizer": _NULL,
        "BertWordPieceLowerCase": _NOT_FOR_TEXT,
        "BertWordPieceCase": _NOT_FOR_TEXT,
    }
)


def without_megatrons(words: Sequence[str]) -> list[str]:
    """``words`` of a command line without the flags that are accepted, and with the command's names of the others.

    Raises:
        ConfigError: with every flag, and tokenizer, that is refused.
    """
    kept: list[str] = []
    problems = []
    for flag, values in _flags(words):
        is_type = flag.replace("_", "-") == TYPE
        meaning = TOKENIZERS.get(" ".join(values)) if is_type else MEANINGS.get(flag.replace("_", "-"))
        match meaning:
            case None:
                kept += [flag, *values]
            case Renamed(name):
                kept += [TYPE, name] if is_type else [name, *values]
            case Accepted(why, allowed) if allowed and tuple(values) not in [(value,) for value in allowed]:
                problems.append(Problem(flag, " ".join(values), why, f"use {' or '.join(allowed)} or leave it out"))
            case Refused(why, way_out):
                problems.append(Problem(flag, " ".join(values), why, way_out))
    refuse(problems)
    return kept


def _flags(words: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each flag with the words up to the next; a word before the first stands where a flag would."""
    starts = [index for index, word in enumerate(words) if index == 0 or word.startswith("--")]
    for start, stop in pairwise([*starts, len(words)]):
        flag, is_joined, value = words[start].partition("=")
        if is_joined and flag.replace("_", "-") in {TYPE, *MEANINGS}:
            yield flag, [value, *words[start + 1 : stop]]
        else:
            yield words[start], words[start + 1 : stop]


def table() -> str:
    """The rows of ``docs/data.md``."""
    tokenizers = {f"{TYPE} {kind}": meaning for kind, meaning in TOKENIZERS.items()}
    return "\n".join(f"| `{flag}` | {_told(meaning)} |" for flag, meaning in {**MEANINGS, **tokenizers}.items())


def _told(meaning: Meaning) -> str:
    match meaning:
        case Renamed(name):
            return f"is `{name}`"
        case Accepted(why, values):
            return f"accepted{''.join(f' as {value}' for value in values)}: {why}"
        case Refused(why, way_out):
            return f"refused: {why}; {way_out}"
