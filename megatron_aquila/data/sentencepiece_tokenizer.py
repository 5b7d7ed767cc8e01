"""SentencePiece models, as Llama-2 and Baichuan2 have them. The one door to the optional package sentencepiece.

Such a model may change a text before it is cut: most fold Unicode's compatibility forms and runs of spaces, and put a
space before a text. What comes back is then the changed text; ``normalization`` says what a model does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_aquila.data.tokenizer import SPACE, Tokenizer
from megatron_aquila.errors import DataError

_MISSING = "sentencepiece or protobuf is not installed: pip install 'megatron_aquila[spm]'"


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with its own special tokens: ``<s>``, ``</s>`` and padding where it has them.

    ``processor``: sentencepiece's object; ``proto``: the bytes of the .model file.
    """

    processor: Any
    proto: bytes

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Special tokens are recognised, where they may be, before the model sees the text."""
        if not self.allow_special_tokens:
            found: list[list[int]] = self.processor.encode(list(texts), out_type=int)
            return found
        return [self._with_specials(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        parts: list[str] = []
        plain: list[int] = []
        for number in [*ids, None]:
            if number is None or number in self._controls:
                parts.append(self.processor.decode(plain) if plain else "")
                parts.append("" if number is None else self._controls[number])
                plain = []
            else:
                plain.append(number)
        return "".join(parts)

    @cached_property
    def vocab_size(self) -> int:
        """Ids run from 0 to one below this; special tokens are among them."""
        return int(self.processor.get_piece_size())

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; ``None`` where it has none."""
        number = int(self.processor.piece_to_id(token))
        return number if number >= 0 and self.processor.id_to_piece(number) == token else None

    def token_bytes(self, number: int) -> bytes:
        """What an id stands for; of a special token its name, of an id without a token nothing."""
        if not 0 <= number < self.vocab_size:
            return b""
        piece: str = self.processor.id_to_piece(number)
        if self.processor.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        return piece.encode() if number in self._controls else piece.replace(SPACE, " ").encode()

    @property
    def unknown(self) -> int | None:
        """Id of the token for what the vocabulary cannot write."""
        return int(self.processor.unk_id())

    def identity(self) -> object:
        """What decides the ids, but for special tokens' roles, as JSON carries it."""
        return [[self.processor.id_to_piece(n), self.processor.get_score(n)] for n in range(self.vocab_size)]

    @property
    def normalization(self) -> str:
        """What the model does to a text before it is cut, in words; empty where nothing."""
        probes = {
            "folds compatibility forms": "Ａ①ﾃ",
            "folds runs of spaces": "a  b",
            "drops spaces at the ends": "a ",
            "drops line breaks": "a\nb",
        }
        return ", ".join(what for what, text in probes.items() if self.decode(self.encode(text)) != text)

    @cached_property
    def _controls(self) -> dict[int, str]:
        numbers = range(self.vocab_size)
        return {n: self.processor.id_to_piece(n) for n in numbers if self.processor.is_control(n)}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in self._controls.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Special tokens; where two begin at one place the one of the lower id, and none where there are none."""
        return re.compile(f"({'|'.join(map(re.escape, self._numbers)) or '(?!)'})")

    def _with_specials(self, text: str) -> list[int]:
        """The text between special tokens is encoded alone, each part as a text of its own."""
        found: list[int] = []
        for part in self._pattern.split(text):
            if part in self._numbers:
                found.append(self._numbers[part])
            elif part:
                found += self.processor.encode(part, out_type=int)
        return found


def load_sentencepiece(path: Path, *, allow_special_tokens: bool = False) -> SentencePieceTokenizer:
    """The tokenizer of a .model file, or of tokenizer.model in a folder.

    Raises:
        DataError: the package is not installed, or the file cannot be read or is no such model.
    """
    file = path / "tokenizer.model" if path.is_dir() else path
    try:
        return from_proto(file.read_bytes(), allow_special_tokens=allow_special_tokens)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{file}: not a model that sentencepiece can read: {error}") from error


def from_proto(proto: bytes, *, allow_special_tokens: bool = False) -> SentencePieceTokenizer:
    """The tokenizer of the bytes of a .model file. Raises as sentencepiece where they are none."""
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(_MISSING) from error
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)

    def named(number: int) -> str | None:
        return None if number < 0 else str(processor.id_to_piece(number))

    return SentencePieceTokenizer(
        kind="SentencePieceTokenizer",
        bos_token=named(processor.bos_id()),
        eod_token=named(processor.eos_id()),
        pad_token=named(processor.pad_id()),
        allow_special_tokens=allow_special_tokens,
        processor=processor,
        proto=proto,
    )


def model_messages() -> Any:
    """The module of the messages that a .model file is made of. Raises DataError where a package is not installed."""
    try:
        return import_module("sentencepiece.sentencepiece_model_pb2")  # its messages are made as it is imported
    except ImportError as error:
        raise DataError(_MISSING) from error
