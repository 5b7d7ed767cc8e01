"""Texts to ids in bulk: the tokenizers library as the reference, gigatoken as the fast way that must prove equal."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.fast_json import dumps
from megatron_aquila.data.han_breaks import MARK, mark_id, pair_table
from megatron_aquila.data.native import INDEX_BUILDER, insert_breaks, join_lines, split_documents
from megatron_aquila.data.records import Join, Joined
from megatron_aquila.data.tokenizer import Tokenizer, library_of
from megatron_aquila.errors import ConfigError, DataError, Problem

Backend = Literal["auto", "gigatoken", "tokenizers"]
BORDER: Final = "\x02"  # stands between documents on their way to gigatoken; a text that holds it goes another way
NO_ID: Final = -1
PROBES: Final = (
    "",
    " ",
    "It's  12,345 tests\n\t\u3000测试，这是一个很长的句子。ＡÀ e\u0301",
    "<|endoftext|>[CLS] </s>",
    "\x00\x01\x02\x7f\u2028\ufeff\U0001f600\U0001f468\u200d\U0001f469",
    "def f(x):\n    return  x\r\n  trailing   \n\n",
    "ｶﾀｶﾅ 한국어 עברית ١٢٣",
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents end to end: ids (uint32) of all, and how many are each one's (int64)."""

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]


class Encoder(Protocol):
    """What a worker tokenizes with; it can be pickled."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The reference."""

    def encode(self, texts: Sequence[str], end: int | None) -> Encoded:
        """The ids of each text, with ``end`` after every text that has any."""


@dataclass(frozen=True)
class ReferenceEncoder:
    """The tokenizers library, a batch at once."""

    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str], end: int | None) -> Encoded:
        """The ids of each text, with ``end`` after every text that has any."""
        after = [] if end is None else [end]
        encoded = [ids + after if ids else ids for ids in self.tokenizer.encode_batch(texts)]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        arrays = [np.array(ids, dtype=np.uint32) for ids in encoded]
        return Encoded(np.concatenate([np.empty(0, np.uint32), *arrays]), lengths)


@dataclass(frozen=True, slots=True)
class _Breaks:
    """Which runs of Han characters may be cut, and the id of the mark that cuts them."""

    table: NDArray[np.uint8]
    mark_id: int


@dataclass(frozen=True)
class GigatokenEncoder:
    """gigatoken, with all texts of a batch as one that a special token of our own divides.

    A special token divides a text before anything else is done to it, so that each part is encoded as if alone; one
    call a batch gives one array, and no Python object a token is made.
    """

    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str], end: int | None) -> Encoded:
        """The ids of each text, with ``end`` after every text that has any."""
        joined = BORDER.join(texts)
        if MARK in joined or joined.count(BORDER) != max(len(texts) - 1, 0):
            return self._with_marks_inside(texts, end)
        text = (joined + BORDER if texts else "").encode()
        _, breaks = self._made
        marked = text if breaks is None else insert_breaks(text, breaks.table, ord(MARK))
        return self.encode_joined(marked, len(texts), end)

    def encode_joined(self, text: bytes, documents: int, end: int | None) -> Encoded:
        """The ids of ``documents`` texts as ``joiner`` joins them."""
        backend, breaks = self._made
        border, mark = self.tokenizer.vocab_size, NO_ID if breaks is None else breaks.mark_id
        last = NO_ID if end is None else end
        ids = backend.encode(text)
        return Encoded(*split_documents(ids, documents=documents, border=border, mark=mark, end=last))

    def joiner(self, key: str, longest: int, enough: int) -> Join | None:
        """Makes one text of the strings under ``key`` of many lines of JSON; None where the extension is not built.

        It joins until there are ``enough`` bytes of lines. A line of more than ``longest`` bytes is left to others, and
        so is one whose text holds what divides texts.
        """
        if join_lines is None:
            return None
        _, breaks = self._made
        table = np.empty(0, np.uint8) if breaks is None else breaks.table
        rules: dict[str, Any] = {"key": key.encode(), "table": table, "border_and_mark": (ord(BORDER), ord(MARK))}

        def join(block: bytes, start: int) -> tuple[Joined, int, int]:
            text, documents, counted, num_bytes, num_lines = join_lines(
                block, start, longest_and_enough=(longest, enough), **rules
            )
            return Joined(text, documents, counted), num_bytes, num_lines

        return join

    def _with_marks_inside(self, texts: Sequence[str], end: int | None) -> Encoded:
        """Rare, so the reference does them one by one, and each run between them goes the fast way."""
        parts: list[Encoded] = []
        clean: list[str] = []
        for text in texts:
            if BORDER in text or MARK in text:
                parts += [self.encode(clean, end)] if clean else []
                parts.append(ReferenceEncoder(self.tokenizer).encode([text], end))
                clean = []
            else:
                clean.append(text)
        parts += [self.encode(clean, end)] if clean else []
        return Encoded(np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts]))

    @cached_property
    def _made(self) -> tuple[Any, "_Breaks | None"]:
        return _gigatoken(self.tokenizer), _breaks(self.tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return (GigatokenEncoder, (self.tokenizer,))


@dataclass(frozen=True, slots=True)
class Choice:
    """The encoder taken, and why it and no other, for the log."""

    encoder: Encoder
    why: str


def choose_encoder(backend: Backend, tokenizer: Tokenizer, sample: Callable[[], Sequence[str]]) -> Choice:
    """gigatoken where it is installed and gives the reference's ids for the sample and for our own probes.

    Raises:
        ConfigError: gigatoken was asked for by name and cannot be taken.
    """
    reference = ReferenceEncoder(tokenizer)
    if backend == "tokenizers":
        return Choice(reference, "tokenizers, as asked for")
    why_not = None
    if importlib.util.find_spec("gigatoken") is None:
        why_not = "gigatoken is not installed: pip install 'megatron_aquila[fast]'"
    else:
        fast = GigatokenEncoder(tokenizer)
        texts = [*PROBES, *sample()]
        why_not = first_difference(fast, reference, texts)
        if why_not is None:
            return Choice(fast, f"gigatoken: equal to tokenizers on {len(texts):,} texts of the input and of ours")
    if backend == "gigatoken":
        raise ConfigError([Problem("--tokenizer-backend", "gigatoken", why_not, "use auto or tokenizers")])
    return Choice(reference, f"tokenizers: {why_not}")


def divided(text: bytes, characters: int) -> list[str]:
    """The first texts of a joined one, each as it was, until they have so many characters together."""
    texts: list[str] = []
    start = held = 0
    while held <= characters and start < len(text):
        end = text.index(BORDER.encode(), start)
        texts.append(text[start:end].decode().replace(MARK, ""))
        held += len(texts[-1])
        start = end + 1
    return texts


def first_difference(fast: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """Why the fast encoder may not be used, or ``None``."""
    try:
        ours = fast.encode(texts, None)
    except Exception as error:  # the library refuses a tokenizer it does not know with any of several
        return f"gigatoken cannot take this tokenizer: {error}"
    theirs = reference.encode(texts, None)
    if np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.tokens, theirs.tokens):
        return None
    ends, other_ends = np.cumsum(ours.lengths), np.cumsum(theirs.lengths)
    for text, end, length, other_end, other in zip(texts, ends, ours.lengths, other_ends, theirs.lengths, strict=True):
        if not np.array_equal(ours.tokens[end - length : end], theirs.tokens[other_end - other : other_end]):
            return f"gigatoken gives other ids than tokenizers for the text {text[:40]!r}"
    raise AssertionError(f"{len(ours.tokens)} and {len(theirs.tokens)} ids, but no text differs")


def check_ids(encoded: Encoded, vocab_size: int) -> int:
    """The largest id, -1 where there is none; ``DataError`` where it is outside the vocabulary."""
    largest = int(encoded.tokens.max()) if len(encoded.tokens) > 0 else -1
    if largest >= vocab_size:
        raise DataError(f"the tokenizer made id {largest}, but its vocabulary has {vocab_size}; it is damaged")
    return largest


def _gigatoken(tokenizer: Tokenizer) -> Any:
    """gigatoken's own object: special tokens are text unless allowed, nothing is put around a text."""
    import gigatoken

    description = library_of(tokenizer).description
    specials = description["added_tokens"]
    if not tokenizer.allow_special_tokens:
        specials = [token for token in specials if not token["special"]]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    border = {"id": tokenizer.vocab_size, "content": BORDER, "special": True, **flags}
    bare = {"added_tokens": [*specials, border], "post_processor": None, "truncation": None, "padding": None}
    return gigatoken.Tokenizer.from_json(dumps(description | bare)).backend


def _breaks(tokenizer: Tokenizer) -> _Breaks | None:
    """``None`` where text may not be cut, or only Python could, which is too slow."""
    number = mark_id(tokenizer)
    if number is None or INDEX_BUILDER != "C++ extension":
        return None
    table = pair_table(tokenizer)
    return None if table is None else _Breaks(table, number)
