"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in transformers' order."""

import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

MIX: Final = 2**63 - 1  # seeds of torch's generator are below it


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn.

    ``temperature`` 0 takes the likeliest. ``top_k`` 0 and ``top_p`` 1 leave all tokens. ``repetition_penalty``: logits
    of tokens that the row holds already are divided by it where positive, else multiplied.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234


def next_tokens(logits_BV: Tensor, rows: list[list[int]], how: Sampling, numbers: list[float]) -> list[int]:
    """A token for each row. ``rows`` are the tokens so far, ``numbers`` in [0, 1) pick among the likely ones.

    Local, on the device of the logits but for the answer.
    """
    logits_BV = penalised(logits_BV, rows, how.repetition_penalty)
    if how.temperature == 0:
        chosen: list[int] = logits_BV.argmax(-1).tolist()
        return chosen
    kept_BV = nucleus(top(logits_BV / how.temperature, how.top_k), how.top_p)
    # By inverting the distribution function in float64, likeliest token first: rounding, which differs between layouts,
    # moves its steps by about 1e-16 and so almost never the token.
    shares_BV, tokens_BV = kept_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    wanted_B1 = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device).unsqueeze(1)
    below_B1 = (shares_BV.cumsum(-1) <= wanted_B1).sum(-1, keepdim=True)
    last_B1 = (shares_BV > 0).sum(-1, keepdim=True) - 1  # the sum of all may round to less than the number
    found: list[int] = tokens_BV.gather(1, torch.minimum(below_B1, last_B1)).squeeze(1).tolist()
    return found


def penalised(logits_BV: Tensor, rows: list[list[int]], penalty: float) -> Tensor:
    """The logits with those of each row's own tokens made smaller."""
    if penalty == 1:
        return logits_BV
    out = logits_BV.clone()
    for logits_V, row in zip(out, rows, strict=True):
        seen = torch.tensor(sorted(set(row)), device=logits_V.device)
        own = logits_V[seen]
        logits_V[seen] = torch.where(own > 0, own / penalty, own * penalty)
    return out


def top(logits_BV: Tensor, k: int) -> Tensor:
    """The ``k`` largest logits, those equal to the last of them too; the others are -inf. 0: all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    last_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < last_B1, float("-inf"))


def nucleus(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens that have ``p`` of the probability together; the others are -inf. 1: all."""
    if p >= 1:
        return logits_BV
    shares_BV, order_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    gone_BV = shares_BV.cumsum(-1) - shares_BV >= p  # what is before it has p already; the first always stays
    gone_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(gone_BV).scatter(1, order_BV, gone_BV), float("-inf"))


class Draws:
    """The random numbers of one row: a function of the seed, the row's number and how many were drawn before.

    So what a row becomes depends neither on the layout nor on what else is in its batch.
    """

    def __init__(self, seed: int, row: int) -> None:
        digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & MIX)

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))
