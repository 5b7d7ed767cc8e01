"""What attention's backward needs at its widest moment where it goes block by block: see ``plan.memory``."""

from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.shape import ModelShape

MOST_SCORES = 2**26  # as of kernels.attention_blocks; a test holds the two together


def attention_moment(
    shape: ModelShape, grid: RankGrid, *, micro_batch: int, item: int, wide: int, context_method: ContextMethod
) -> int:
    """Bytes of one rank, at the widest of a ring's, that of two ranges and that of scores which are changed.

    ``item`` and ``wide``: bytes of an activation, and of what is computed in float32 or wider.
    """
    tokens = micro_batch * shape.seq_len // grid.cp
    ring = _ring(shape, item, wide) if grid.cp > 1 and context_method == "ring" else 0
    two_ranges = _two_ranges(shape, item, wide) if shape.rope_scaling == "two-range" else 0
    scores = 0
    if shape.position_embedding == "alibi" or shape.score_clamp is not None:
        held = min(MOST_SCORES, micro_batch * shape.num_heads // grid.tp * shape.seq_len**2)
        scores = _scores(shape, held, tokens // grid.tp, wide)
    return max(tokens * ring // grid.tp, tokens * two_ranges // grid.tp, scores)


def _ring(shape: ModelShape, item: int, wide: int) -> int:
    """Of a token: the output's gradient, q's summed and a block's of it; keys and values here and on their way, and a
    block's gradients of them; and their sums, here, leaving and coming.
    """
    return shape.attention_size * (2 * item + wide) + 2 * shape.kv_size * (3 * item + 3 * wide)


def _two_ranges(shape: ModelShape, item: int, wide: int) -> int:
    """Of a token: q and k of far pairs, the output's gradient, the sums of the gradients of both pairs and of v, and a
    block's.
    """
    return shape.attention_size * (3 * item + 2 * wide) + shape.kv_size * (3 * item + 3 * wide)


def _scores(shape: ModelShape, held: int, tokens: int, wide: int) -> int:
    """Of a block's ``held`` scores the raw and the held ones, the weights' gradient and its copies; and, wide, the
    gradients of all keys and values of ``tokens``.
    """
    return 4 * wide * held + 2 * wide * tokens * shape.kv_size
