"""Aquila's tokenizer: GPT-2's byte-level BPE with eight special tokens after the vocabulary; or any tokenizer.json."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_aquila.data.aquila_tokens import AQUILA_SPECIAL_TOKENS, BOS, EOD, PAD
from megatron_aquila.data.fast_json import loads
from megatron_aquila.data.manifest import TokenizerFacts
from megatron_aquila.data.tokenizer_files import (
    byte_letters,
    check_specials,
    needed_files,
    read_json,
    read_merges,
    read_vocab,
    token_text,
)
from megatron_aquila.errors import DataError

TokenizerType = Literal["AquilaTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"]
SPACE: Final = "\u2581"  # what SentencePiece writes for a space
_NOT_TEXT: Final = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as surrogateescape has them
_BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
_PROBE: Final = (
    "It's  12,345 tests\n\t测试，ＡÀ e\u0301 <|endoftext|>[CLS] </s>"  # spaces, digits, forms of Unicode, specials
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """Text to ids and back.

    Text is text: what looks like a special token in it becomes ordinary tokens, so that no document can end itself,
    unless ``allow_special_tokens``. Nothing is put before or after a text.

    ``kind`` is what ``--tokenizer-type`` calls it. ``bos_token``, ``eod_token`` and ``pad_token`` are these special
    tokens as written; ``None`` where there is none.
    """

    kind: TokenizerType
    bos_token: str | None
    eod_token: str | None
    pad_token: str | None
    allow_special_tokens: bool = False

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids run from 0 to one below this; special tokens are among them."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; ``None`` where it has none."""

    @abstractmethod
    def token_bytes(self, number: int) -> bytes:
        """What an id stands for; of a special token its name, of an id without a token nothing."""

    @property
    @abstractmethod
    def unknown(self) -> int | None:
        """Id of the token for what the vocabulary cannot write."""

    @abstractmethod
    def identity(self) -> object:
        """What decides the ids, but for special tokens' roles and normalization, as JSON carries it; keys in order."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes: of what is text as ``encode``, of the others one by one.

        ``decode_bytes`` gives the same bytes again where the tokenizer normalizes nothing, as Aquila's; SentencePiece
        models put a space before a text, and most change some characters.

        Raises:
            DataError: a byte is no text and has no token of its own.
        """
        ids: list[int] = []
        for part in _NOT_TEXT.split(data.decode("utf-8", errors="surrogateescape")):
            if _NOT_TEXT.match(part):
                ids += [self._byte(byte) for byte in part.encode("utf-8", errors="surrogateescape")]
            elif part != "":
                ids += self.encode(part)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """What ids stand for, whether it is text or not."""
        return b"".join(map(self.token_bytes, ids))

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

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are no text."""
        return frozenset(number for number in (self.bos, self.eod, self.pad) if number is not None)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.token_id(token)

    def _byte(self, byte: int) -> int:
        letter = byte_letters()[byte]
        for token in (letter, f"<0x{byte:02X}>"):
            number = self.token_id(token)
            if number is not None and self.token_bytes(number) == bytes([byte]):
                return number
        raise DataError(f"the byte {byte:#04x} is no text, and this tokenizer has no token for it")


@dataclass(frozen=True, kw_only=True)
class LibraryTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, Aquila's among them.

    ``described`` is what ``description`` is, where whoever made the model knows it: the library takes its time to say.
    """

    model: tokenizers.Tokenizer
    described: InitVar[Mapping[str, Any] | None] = None

    def __post_init__(self, described: Mapping[str, Any] | None) -> None:
        if described is not None:
            self.__dict__["description"] = described

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

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; ``None`` where it has none."""
        return self.model.token_to_id(token)

    def token_bytes(self, number: int) -> bytes:
        """What an id stands for; of a special token its name, of an id without a token nothing."""
        token = self.model.id_to_token(number)
        if token is None or number in self._added:
            return b"" if token is None else token.encode()
        if self._letters is not None:
            return bytes(self._letters[letter] for letter in token)
        if _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    @cached_property
    def unknown(self) -> int | None:
        """Id of the token for what the vocabulary cannot write."""
        model = self.description["model"]
        token = model.get("unk_token")
        number = model.get("unk_id") if token is None else self.token_id(token)
        return number if isinstance(number, int) else None

    def identity(self) -> object:
        """What decides the ids, but for special tokens' roles and normalization, as JSON carries it."""
        model = self.description["model"]
        specials = {number: token.content for number, token in self.model.get_added_tokens_decoder().items()}
        merges = model.get("merges", [])
        if merges and isinstance(merges[0], str):  # as older files have them
            merges = [pair.split(" ") for pair in merges]
        scores = model["vocab"] if isinstance(model.get("vocab"), list) else []  # of a Unigram model
        vocab = self.vocab
        return [{token: vocab[token] for token in sorted(vocab)}, scores, merges, dict(sorted(specials.items()))]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are no text."""
        added = self.model.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.model.get_added_tokens_decoder())

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """The byte of each letter where tokens are written in GPT-2's letters for bytes."""
        decoder = self.description["decoder"]
        is_bytes = decoder is not None and '"ByteLevel"' in json.dumps(decoder)
        return {letter: byte for byte, letter in enumerate(byte_letters())} if is_bytes else None


def library_of(tokenizer: Tokenizer) -> LibraryTokenizer:
    """The tokenizer as one of the tokenizers library. Raises ``DataError`` where another library is behind it."""
    if not isinstance(tokenizer, LibraryTokenizer):
        raise DataError(f"a {tokenizer.kind} has no tokenizer.json; only tokenizers of vocab.json or tokenizer.json do")
    return tokenizer


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

    ``AquilaTokenizer`` takes the three files, ``HuggingFaceTokenizer`` a tokenizer.json or the folder of one, whose
    special tokens are those of tokenizer_config.json beside it; ``SentencePieceTokenizer`` a .model file.

    Raises:
        ConfigError: a file that this kind needs is not given.
        DataError: a file cannot be read or does not hold what it should.
    """
    if kind == "HuggingFaceTokenizer":
        (folder_or_file,) = needed_files(kind, {"--tokenizer-model": tokenizer_model})
        return _from_json(folder_or_file, allow_special_tokens=allow_special_tokens)
    if kind == "SentencePieceTokenizer":
        from megatron_aquila.data.sentencepiece_tokenizer import load_sentencepiece

        (file,) = needed_files(kind, {"--tokenizer-model": tokenizer_model})
        return load_sentencepiece(file, allow_special_tokens=allow_special_tokens)
    flags = {"--vocab-file": vocab_file, "--merge-file": merge_file, "--special-tokens-file": special_tokens_file}
    vocab_path, merge_path, special_path = needed_files(kind, flags)
    vocab, merges = read_vocab(vocab_path, PAD), read_merges(merge_path)
    check_specials(special_path, vocab, vocab_path, AQUILA_SPECIAL_TOKENS)
    try:
        model = build_aquila_tokenizer(vocab, merges)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{merge_path} does not fit {vocab_path}: {error}; take the files of one tokenizer") from error
    tokenizer = aquila_tokenizer(model, allow_special_tokens=allow_special_tokens)
    return replace(tokenizer, described=_aquila_description(vocab, merges))


def aquila_tokenizer(model: tokenizers.Tokenizer, *, allow_special_tokens: bool = False) -> LibraryTokenizer:
    """``build_aquila_tokenizer``'s result with Aquila's roles of the special tokens."""
    return LibraryTokenizer(
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


def _aquila_description(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What ``build_aquila_tokenizer``'s result says of itself: one without words says all but these."""
    said: dict[str, Any] = loads(build_aquila_tokenizer({PAD: 0}, []).to_str())
    for token in said["added_tokens"][1:]:
        token["id"] += len(vocab) - 1
    return said | {"model": said["model"] | {"vocab": vocab, "merges": merges}}


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, of what decides the ids: two tokenizers of one fingerprint are interchangeable.

    It covers the vocabulary, the merges in their order, the special tokens with their ids, which of them ends a
    document, and, for normalizers and the splitting into words, the ids of a fixed text. Neither the kind of the files
    nor ``allow_special_tokens`` is in it.
    """
    probe = replace(tokenizer, allow_special_tokens=False).encode(_PROBE)
    identity = tokenizer.identity()
    assert isinstance(identity, list), f"{type(tokenizer).__name__} has an identity of {type(identity).__name__}"
    identity = [*identity, tokenizer.eod_token, probe]
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
    config = read_json(config_file) if config_file.exists() else {}
    named = {key: token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    missing = [token for token in named.values() if token is not None and model.token_to_id(token) is None]
    if missing:
        raise DataError(f"{config_file}: {missing} are not in {file}; take the two files of one tokenizer")
    eod = named["eos_token"]
    if eod is None and not config_file.exists() and model.token_to_id(PAD) is not None:
        eod = PAD  # GPT-2's own files come without a tokenizer_config.json
    return LibraryTokenizer(
        kind="HuggingFaceTokenizer",
        model=model,
        bos_token=named["bos_token"],
        eod_token=eod,
        pad_token=named["pad_token"],
        allow_special_tokens=allow_special_tokens,
    )


def tokenizer_at(path: Path) -> Tokenizer:
    """The tokenizer of a folder or a file: a SentencePiece .model, a tokenizer.json, or Aquila's three files.

    Raises:
        DataError: nothing of that is there, or it cannot be read.
    """
    if path.suffix == ".model" or (path / "tokenizer.model").is_file():
        return load_tokenizer("SentencePieceTokenizer", tokenizer_model=path)
    if path.is_file() or (path / "tokenizer.json").is_file():
        return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=path)
    vocab, merges, specials = (path / name for name in ("vocab.json", "merges.txt", "special_tokens.txt"))
    if not vocab.is_file():
        raise DataError(f"{path}: there is no tokenizer: no tokenizer.json, tokenizer.model or vocab.json")
    return load_tokenizer("AquilaTokenizer", vocab_file=vocab, merge_file=merges, special_tokens_file=specials)
