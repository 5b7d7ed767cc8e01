"""Aquila's tokenizer: GPT-2's byte-level BPE with eight special tokens after the vocabulary; or any tokenizer.json."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, cast

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_aquila.data.fast_json import loads
from megatron_aquila.data.manifest import TokenizerFacts
from megatron_aquila.errors import ConfigError, DataError, Problem

TokenizerType = Literal["AquilaTokenizer", "HuggingFaceTokenizer"]
PAD: Final = "<|endoftext|>"
BOS: Final = "[CLS]"
EOD: Final = "</s>"
AQUILA_SPECIAL_TOKENS: Final = (
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    BOS,
    EOD,
)
AQUILA_VOCAB_SIZE: Final = 100008  # of Aquila's own tokenizer; the eight special tokens are its last ids
AQUILA_GOLDEN_IDS: Final = {
    "这是一个测试": (15128, 5744),
    "Hello world": (22299, 3117),
    "There is something wrong, please query again": (4891, 397, 3337, 6689, 12, 8641, 13418, 1989),
    "请给出10个要到北京旅游的理由。": (1486, 19743, 865, 424, 50927, 2557, 3063, 32345, 278),
    "### Human: 你好\n": (8090, 16399, 26, 221, 34856, 199),
}  # what Aquila's own tokenizer makes of these texts
SHOWN: Final = 80  # characters of a wrong file that a message repeats
_PROBE: Final = (
    "It's  12,345 tests\n\t测试，ＡÀ e\u0301 <|endoftext|>[CLS] </s>"  # spaces, digits, forms of Unicode, specials
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids and back.

    Text is text: what looks like a special token in it becomes ordinary tokens, so that no document can end itself,
    unless ``allow_special_tokens``. Nothing is put before or after a text.

    ``kind`` is what ``--tokenizer-type`` calls it. ``bos_token``, ``eod_token`` and ``pad_token`` are these special
    tokens as written; ``None`` where there is none.
    """

    kind: TokenizerType
    model: tokenizers.Tokenizer
    bos_token: str | None
    eod_token: str | None
    pad_token: str | None
    allow_special_tokens: bool = False

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        self.model.encode_special_tokens = not self.allow_special_tokens
        return [found.ids for found in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.model.decode(ids, skip_special_tokens=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def description(self) -> dict[str, Any]:
        """The model as tokenizer.json has it, made and parsed once; not to be changed."""
        described: dict[str, Any] = loads(self.model.to_str())
        return described

    @cached_property
    def vocab_size(self) -> int:
        """Ids run from 0 to one below this; special tokens are among them."""
        return max(self.vocab.values(), default=-1) + 1

    @property
    def vocab(self) -> dict[str, int]:
        """The id of every token, special ones included."""
        words = self.description["model"].get("vocab")
        if not isinstance(words, dict):  # a Unigram model's are in a list, with their scores
            return self.model.get_vocab()
        return {**words, **{token["content"]: token["id"] for token in self.description["added_tokens"]}}

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a conversation."""
        return self._id_of(self.bos_token)

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document."""
        return self._id_of(self.eod_token)

    @property
    def pad(self) -> int | None:
        """Id of the token that fills up a batch."""
        return self._id_of(self.pad_token)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.model.token_to_id(token)


def load_tokenizer(
    kind: TokenizerType,
    *,
    vocab_file: Path | None = None,
    merge_file: Path | None = None,
    special_tokens_file: Path | None = None,
    tokenizer_model: Path | None = None,
    allow_special_tokens: bool = False,
) -> Tokenizer:
    """The tokenizer that the flags name.

    ``AquilaTokenizer`` takes the three files, ``HuggingFaceTokenizer`` a tokenizer.json or the folder of one; the
    special tokens of the latter are those of tokenizer_config.json beside it.

    Raises:
        ConfigError: a file that this kind needs is not given.
        DataError: a file cannot be read or does not hold what it should.
    """
    if kind == "HuggingFaceTokenizer":
        (folder_or_file,) = _needed(kind, {"--tokenizer-model": tokenizer_model})
        return _from_json(folder_or_file, allow_special_tokens=allow_special_tokens)
    flags = {"--vocab-file": vocab_file, "--merge-file": merge_file, "--special-tokens-file": special_tokens_file}
    vocab_path, merge_path, special_path = _needed(kind, flags)
    vocab, merges = _read_vocab(vocab_path), _read_merges(merge_path)
    _check_specials(special_path, vocab, vocab_path)
    try:
        model = build_aquila_tokenizer(vocab, merges)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{merge_path} does not fit {vocab_path}: {error}; take the files of one tokenizer") from error
    return aquila_tokenizer(model, allow_special_tokens=allow_special_tokens)


def aquila_tokenizer(model: tokenizers.Tokenizer, *, allow_special_tokens: bool = False) -> Tokenizer:
    """``build_aquila_tokenizer``'s result with Aquila's roles of the special tokens."""
    return Tokenizer(
        kind="AquilaTokenizer",
        model=model,
        bos_token=BOS,
        eod_token=EOD,
        pad_token=PAD,
        allow_special_tokens=allow_special_tokens,
    )


def build_aquila_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE; ``AQUILA_SPECIAL_TOKENS`` get the ids after the vocabulary, in their order."""
    model = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (PAD, *AQUILA_SPECIAL_TOKENS)]
    )
    return model


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, of what decides the ids: two tokenizers of one fingerprint are interchangeable.

    It covers the vocabulary, the merges in their order, the special tokens with their ids, which of them ends a
    document, and, for normalizers and the splitting into words, the ids of a fixed text. Neither the kind of the files
    nor ``allow_special_tokens`` is in it.
    """
    model = tokenizer.description["model"]
    specials = {number: token.content for number, token in tokenizer.model.get_added_tokens_decoder().items()}
    merges = model.get("merges", [])
    if merges and isinstance(merges[0], str):  # as older files have them
        merges = [pair.split(" ") for pair in merges]
    probe = replace(tokenizer, allow_special_tokens=False).encode(_PROBE)
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []  # of a Unigram model
    vocab, specials = tokenizer.vocab, dict(sorted(specials.items()))
    vocab = {token: vocab[token] for token in sorted(vocab)}  # a third of the time of json's sort_keys
    identity = [vocab, scores, merges, specials, tokenizer.eod_token, probe]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """What the manifest of a data set says of the tokenizer that made it."""
    return TokenizerFacts(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, fingerprint=fingerprint(tokenizer))


def _from_json(path: Path, *, allow_special_tokens: bool) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{file}: not a tokenizer.json that the tokenizers library can read: {error}") from error
    config_file = file.with_name("tokenizer_config.json")
    config = _read_json(config_file) if config_file.exists() else {}
    named = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    missing = [token for token in named.values() if token is not None and model.token_to_id(token) is None]
    if missing:
        raise DataError(f"{config_file}: {missing} are not in {file}; take the two files of one tokenizer")
    eod = named["eos_token"]
    if eod is None and not config_file.exists() and model.token_to_id(PAD) is not None:
        eod = PAD  # GPT-2's own files come without a tokenizer_config.json
    return Tokenizer(
        kind="HuggingFaceTokenizer",
        model=model,
        bos_token=named["bos_token"],
        eod_token=eod,
        pad_token=named["pad_token"],
        allow_special_tokens=allow_special_tokens,
    )


def _token_text(value: object) -> str | None:
    """tokenizer_config.json writes a token as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _needed(kind: TokenizerType, flags: Mapping[str, Path | None]) -> list[Path]:
    problems = [
        Problem(flag, "(not given)", f"--tokenizer-type {kind} needs it", "give the file, or another --tokenizer-type")
        for flag, path in flags.items()
        if path is None
    ]
    if problems:
        raise ConfigError(problems)
    return [path for path in flags.values() if path is not None]


def _check_specials(path: Path, vocab: Mapping[str, int], vocab_path: Path) -> None:
    """The ids of special tokens are their places in the file, so that another order is another tokenizer."""
    found = _lines(path)
    if tuple(found) != AQUILA_SPECIAL_TOKENS:
        raise DataError(
            f"{path}: not Aquila's special tokens, one a line and in that order: expected "
            f"{' '.join(AQUILA_SPECIAL_TOKENS)}, found {_shortened(' '.join(found))}; take the file that came with "
            f"{vocab_path}, or a tokenizer.json with --tokenizer-type HuggingFaceTokenizer"
        )
    present = [token for token in found if token in vocab]
    if present:
        raise DataError(
            f"{vocab_path}: it holds {' '.join(present)}, which {path.name} puts after the vocabulary; take the files "
            "of one tokenizer"
        )


def _read_vocab(path: Path) -> dict[str, int]:
    entries = _read_json(path)
    ids = entries.values()
    if set(map(type, ids)) != {int} or set(ids) != set(range(len(entries))) or entries.get(PAD) != 0:
        raise DataError(f"{path}: not a vocabulary: ids must run from 0 without a gap, and {PAD} must have id 0")
    return cast(dict[str, int], entries)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = _lines(path)
    first = 1 if lines and lines[0].startswith("#version") else 0
    for number, line in enumerate(lines[first:], start=first + 1):
        if line.count(" ") != 1 or line[0] == " " or line[-1] == " ":
            raise DataError(f"{path}:{number}: not a merge of two tokens: {_shortened(line)!r}; take merges.txt")
    tokens = " ".join(lines[first:]).split(" ")
    return list(zip(tokens[::2], tokens[1::2], strict=False))  # of no line there is one empty token


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object but a {type(value).__name__}")
    return value


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [line for line in text.split("\n") if line != ""]


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
