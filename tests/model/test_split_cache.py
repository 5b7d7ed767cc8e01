"""A cache that is shared out gives, token by token, what attention over whole rows gives at once."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.blocks import BLOCKS_CPU
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.kernels.two_range import Ranges
from megatron_aquila.model.split_cache import SplitCache
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.ulysses import UlyssesAttention
from megatron_aquila.verify.pool import WorkerPool
from tests.parallel.test_context_attention import cp_group

PADDING, PROMPT, CAPACITY, HEADS = (6, 0), 8, 15, 4
FORWARDS = (PROMPT, 1, 1, 3, 1)  # the last token's room stays empty
CHANGES = {
    "none": Scores(),
    "ALiBi": Scores(slopes=(0.5, 0.25, 0.125, 0.0625), clamp=0.7),
    "two ranges": Scores(ranges=Ranges(threshold=3, factor=2.5, base=100.0), clamp=0.7),
}
Pool = Callable[[int], WorkerPool]


def inputs() -> list[torch.Tensor]:
    """q, k and v of two rows."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((sum(FORWARDS), len(PADDING), heads, 8) for heads in (HEADS, 2, 2))
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def expected(scores: Scores) -> torch.Tensor:
    """Of every row by itself; of padding zeros."""
    out = torch.zeros_like(inputs()[0])
    for row, padding in enumerate(PADDING):
        q, k, v = (x[padding:, row : row + 1] for x in inputs())
        out[padding:, row : row + 1] = causal_attention_reference(q, k, v, scores=scores)
    return out


def empty_cache(size: int, method: str, scores: Scores) -> SplitCache:
    cp, kernel = cp_group(size), SCORE_BLOCKS if scores.alters else BLOCKS_CPU
    ring = RingAttention(cp=cp, kernel=kernel, overlap=True)
    split = ring if method == "ring" else UlyssesAttention(cp=cp, attention=kernel)
    attention, padding_B = partial(split, scores=scores), torch.tensor(PADDING)
    return SplitCache(1, CAPACITY, padding_B, cp=cp, method=method, attention=attention, scores=scores)


def attended(size: int, method: str, scores: Scores) -> tuple[int, torch.Tensor]:
    """The tokens that this rank has room for, and the outputs of what it computed, zeros elsewhere and of padding."""
    cache, out, start = empty_cache(size, method, scores), torch.zeros_like(inputs()[0]), 0
    for num_tokens in FORWARDS:
        positions_BS = cache.extend(num_tokens)
        places = start + cache.chosen
        assert positions_BS.tolist() == [[max(0, place - padding) for place in places.tolist()] for padding in PADDING]
        out[places] = cache.layers[0](*(x[places] for x in inputs()))
        start += num_tokens
    for row, padding in enumerate(PADDING):
        out[:padding, row] = 0
    return cache.room, out


def worst(parts: list[tuple[int, torch.Tensor]], scores: Scores) -> float:
    """Of the prompts the ranks' tokens together, of later ones each rank's."""
    right = expected(scores)
    prompts = sum(out[:PROMPT] for _, out in parts)
    errors = [prompts - right[:PROMPT], *(out[PROMPT:] - right[PROMPT:] for _, out in parts)]
    return max(float(error.abs().max()) for error in errors)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_token_by_token_as_at_once(pool: Pool, method: str, size: int) -> None:
    for name, scores in CHANGES.items():
        parts = pool(size).run(attended, size, method, scores)
        assert worst(parts, scores) < 1e-14, name
        assert [room for room, _ in parts] == [PROMPT // size + -(-(CAPACITY - PROMPT) // size)] * size
        assert len({tuple(out[PROMPT:].flatten().tolist()) for _, out in parts}) == 1, "to the bit on all ranks"


def test_the_test_can_fail(pool: Pool) -> None:
    """Of other scores, and where parts are not weighed."""
    parts = pool(2).run(attended, 2, "ring", Scores())
    assert worst(parts, CHANGES["ALiBi"]) > 1e-2
    assert worst(pool(2).run(attended_by_halves, 2, "ring", Scores()), Scores()) > 1e-2


def attended_by_halves(size: int, method: str, scores: Scores) -> tuple[int, torch.Tensor]:
    with mock.patch("megatron_aquila.model.split_cache.merged_parts", lambda o, _lse: o.mean(0)):
        return attended(size, method, scores)


def test_there_is_no_room_beyond_the_end() -> None:
    cache = empty_cache(1, "ring", Scores())
    cache.extend(PROMPT)
    with pytest.raises(AssertionError, match="16 tokens in a cache of 15"):
        cache.extend(CAPACITY + 1 - PROMPT)
