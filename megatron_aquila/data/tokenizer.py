"""Aquila's tokenizer: GPT-2's byte-level BPE with eight special tokens after the vocabulary; or any tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

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


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids and back.

    Text is text: what looks like a special token in it becomes ordinary tokens, so that no document can end itself,
    unless ``allow_special_tokens``. Nothing is put before or after a text.

    ``bos_token``, ``eod_token`` and ``pad_token`` are these special tokens as written; ``None`` where there is none.
    """

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

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to one below this; special tokens are among them."""
        return max(self.model.get_vocab().values(), default=-1) + 1

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
    vocab, merges, specials = _read_vocab(vocab_path), _read_merges(merge_path), _lines(special_path)
    present = [token for token in specials if token in vocab]
    if present or len(set(specials)) < len(specials) or BOS not in specials or EOD not in specials:
        raise DataError(
            f"{special_path}: special tokens {specials}: each once, {BOS} and {EOD} among them, and none of them in "
            f"{vocab_path} ({len(present)} are); take the three files of one tokenizer"
        )
    try:
        model = build_aquila_tokenizer(vocab, merges, specials)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{merge_path} does not fit {vocab_path}: {error}; take the files of one tokenizer") from error
    return aquila_tokenizer(model, allow_special_tokens=allow_special_tokens)


def aquila_tokenizer(model: tokenizers.Tokenizer, *, allow_special_tokens: bool = False) -> Tokenizer:
    """``build_aquila_tokenizer``'s result with Aquila's roles of the special tokens."""
    return Tokenizer(
        model=model, bos_token=BOS, eod_token=EOD, pad_token=PAD, allow_special_tokens=allow_special_tokens
    )


def build_aquila_tokenizer(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], specials: Sequence[str]
) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE; ``specials`` get the ids after the vocabulary, in their order."""
    model = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, *specials)])
    return model


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


def _read_vocab(path: Path) -> dict[str, int]:
    entries = _read_json(path)
    vocab = {token: number for token, number in entries.items() if isinstance(number, int)}
    if set(vocab.values()) != set(range(len(entries))) or vocab.get(PAD) != 0:
        raise DataError(f"{path}: not a vocabulary: ids must run from 0 without a gap, and {PAD} must have id 0")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_lines(path), start=1):
        if number == 1 and line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise DataError(f"{path}:{number}: not a merge of two tokens: {line!r}")
        merges.append((left, right))
    return merges


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
