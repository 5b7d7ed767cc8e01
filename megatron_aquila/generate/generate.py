"""Prompts in, continuations out: one prefill, then a token a row and step, until every row has ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_aquila.errors import DataError
from megatron_aquila.generate.runner import Runner
from megatron_aquila.generate.sampling import Draws, Sampling, next_tokens
from megatron_aquila.generate.stops import Stops, TextStream

Decode = Callable[[Sequence[int]], str]
Show = Callable[[int, str], None]  # a row's place among the prompts and the next piece of its text


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a prompt became: its new tokens, one that ended it included, and their text without that or a stop word.

    ``is_ended``: by a token or a word; else by the longest length.
    """

    tokens: tuple[int, ...]
    text: str
    is_ended: bool


class _Row:
    """One prompt on its way."""

    def __init__(self, prompt: Sequence[int], room: int, stream: TextStream, draws: Draws) -> None:
        self.tokens, self.room = list(prompt), room
        self._prompt_size, self._stream, self._draws = len(prompt), stream, draws
        self._text = ""

    @property
    def is_done(self) -> bool:
        return self._stream.stopped or len(self.tokens) - self._prompt_size == self.room

    def draw(self) -> float:
        return self._draws.draw()

    def add(self, token: int) -> str:
        """The text that has become certain with one more token."""
        if self.is_done:
            return ""
        self.tokens.append(token)
        piece = self._stream.add(token)
        if self.is_done and not self._stream.stopped:
            piece += self._stream.finish()
        self._text += piece
        return piece

    def result(self) -> Continuation:
        return Continuation(tuple(self.tokens[self._prompt_size :]), self._text, self._stream.stopped)


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    decode: Decode,
    how: Sampling,
    stops: Stops = Stops(),
    max_new_tokens: int,
    show: Show = lambda row, piece: None,
    first_row: int = 0,
) -> list[Continuation]:
    """The continuation of every prompt, the same on every rank. Collective over tp, cp and pp.

    Rows are padded on the left, so that all have their last token, and their next, in one place, and so that cp can
    share them; positions count from each row's first token. A row grows up to the model's longest sequence.
    ``first_row``: the number of the first prompt, of which its random numbers are a function. ``show`` is called as
    text becomes certain.

    Raises:
        DataError: a prompt is empty, holds a token outside the vocabulary, or leaves no room for a new one.
    """
    check_prompts(prompts, vocab_size=runner.shape.vocab_size, seq_len=runner.shape.seq_len)
    longest, device = runner.splittable(max(map(len, prompts))), runner.ctx.device
    rows = [
        _Row(
            prompt,
            min(max_new_tokens, runner.shape.seq_len - len(prompt)),
            TextStream(decode, prompt, stops),
            Draws(how.seed, first_row + number),
        )
        for number, prompt in enumerate(prompts)
    ]
    padding_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    caches = runner.new_caches(longest + max(row.room for row in rows), padding_B)
    new = [[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
    with torch.no_grad():
        while not all(row.is_done for row in rows):
            logits_BV = runner.last_logits(torch.tensor(new, device=device), caches)
            numbers = [row.draw() for row in rows]
            mine = None if logits_BV is None else next_tokens(logits_BV, [row.tokens for row in rows], how, numbers)
            new = [[token] for token in runner.share(mine)]
            for number, (row, (token,)) in enumerate(zip(rows, new, strict=True)):
                if piece := row.add(token):
                    show(number, piece)
    return [row.result() for row in rows]


def check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int, seq_len: int) -> None:
    """Raise ``DataError`` unless every prompt has a token, room for another, and tokens of the vocabulary alone."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} is empty; give it a token to begin with")
        if len(prompt) >= seq_len:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens; a sequence has {seq_len} at most, its answer too: "
                "give a shorter prompt, or a larger --seq-len, with --rope-scaling where the model needs it"
            )
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise DataError(f"prompt {number}: token {wrong[0]} is outside the vocabulary of {vocab_size}")
