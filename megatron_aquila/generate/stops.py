"""Where a text ends, and what of it may be shown already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPLACEMENT = "\ufffd"  # what decoding puts for bytes that are no character, or not yet


@dataclass(frozen=True, kw_only=True, slots=True)
class Stops:
    """``ids``: tokens that end a row, and are not of its text. ``words``: so do these, wherever they appear in it."""

    ids: frozenset[int] = frozenset()
    words: tuple[str, ...] = ()


class TextStream:
    """The text of one row, piece by piece, as its tokens come: whole characters only, and nothing of a stop word.

    ``decode`` is the tokenizer's. A character may be several tokens, so pieces are what decoding a few more tokens adds
    to the text of those before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Stops) -> None:
        self._decode, self._stops = decode, stops
        self._ids = list(prompt[-4:])  # some tokenizers drop a space at the beginning of what they decode
        self._shown, self._whole = 0, len(self._ids)  # ids before the piece, and those decoded to whole characters
        self._held = ""  # text that may be the beginning of a stop word
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece that a token completes, often none. After it ``stopped`` says whether the row has ended."""
        if token in self._stops.ids:
            self.stopped = True
            return self.finish()
        self._ids.append(token)
        before, after = (self._decode(self._ids[self._shown : stop]) for stop in (self._whole, len(self._ids)))
        if after.endswith(REPLACEMENT) and len(self._ids) - self._whole < 4:  # a character has four bytes at most
            return ""
        piece = after[len(before) :]
        self._shown, self._whole = self._whole, len(self._ids)
        return self._without_stops(piece)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        before, after = (self._decode(self._ids[self._shown : stop]) for stop in (self._whole, len(self._ids)))
        self._shown = self._whole = len(self._ids)
        piece, self._held = self._held + after[len(before) :], ""
        ends = [place for word in self._stops.words if (place := piece.find(word)) >= 0]
        return piece[: min(ends)] if ends else piece

    def _without_stops(self, piece: str) -> str:
        text = self._held + piece
        ends = [place for word in self._stops.words if (place := text.find(word)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, word) for word in self._stops.words), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of ``text`` begin ``word``."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)
