"""What attention's backward needs at its widest moment where it goes block by block: see ``plan.memory``.

A test traces it: the plan is from 1 % below to 4 % above, and to 8 % where far pairs are clamped.
"""

from dataclasses import dataclass

from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.sequence import ContextMethod, num_shared_heads
from megatron_aquila.plan.shape import ModelShape

MOST_SCORES = 2**26  # as of kernels.attention_blocks; a test holds the two together


def attention_moment(
    shape: ModelShape, grid: RankGrid, *, micro_batch: int, item: int, wide: int, context_method: ContextMethod
) -> int:
    """Bytes of one rank. Fused attention of whole samples, which keeps its own counsel, has none.

    ``item`` and ``wide``: bytes of an activation, and of what is computed in float32 or wider.
    """
    is_ring = grid.cp > 1 and context_method == "ring"
    num_heads, kv_heads = shape.num_heads // grid.tp, shape.num_kv_heads // grid.tp
    if is_ring:
        tokens = shape.seq_len // grid.cp
    else:
        tokens, num_heads = shape.seq_len, num_heads // grid.cp
        kv_heads = num_shared_heads(kv_heads, grid.cp) // grid.cp
    moment = _Moment(shape, micro_batch, tokens, num_heads, kv_heads, item, wide)
    return moment.of_ring(grid.cp) if is_ring else moment.of_whole(grid.cp)


@dataclass(frozen=True, slots=True)
class _Moment:
    """``tokens`` of a sample that a rank attends with, and the heads by which it does."""

    shape: ModelShape
    micro_batch: int
    tokens: int
    num_heads: int
    kv_heads: int
    item: int
    wide: int

    @property
    def queries(self) -> int:
        """Elements of q, as many as of the output."""
        return self.micro_batch * self.tokens * self.num_heads * self.shape.head_dim

    @property
    def keys(self) -> int:
        """Elements of k, as many as of v."""
        return self.micro_batch * self.tokens * self.kv_heads * self.shape.head_dim

    @property
    def alters(self) -> bool:
        """Whether scores are biased or clamped."""
        return self.shape.position_embedding == "alibi" or self.shape.score_clamp is not None

    def of_whole(self, cp: int) -> int:
        """The output's gradient, and before a gradient of two ranges or of changed scores is rounded the sums of it."""
        if self.shape.rope_scaling == "two-range":
            sums = self.wide * (self.queries + 2 * self.keys) + self.wide * self.keys
            return self.item * self.queries + sums + self._far(self.tokens - 2 * self.shape.rope_trained_len)
        if not self.alters:
            return 0
        exchanged = self.item * self.queries if cp > 1 else 0
        sums = self.item * self.queries + 2 * self.wide * self.keys
        return exchanged + self.item * self.queries + sums + self._scores(self.tokens, self.tokens)

    def of_ring(self, cp: int) -> int:
        """The output's gradient and q's summed; keys and values here and, unless it is the last turn, on their way; and
        their sums, here, leaving and coming, but for the first block, of a rank's own tokens. Of these, what a block
        needs: its gradients, or what leads to them.
        """
        both, here = 2 * self.keys, 1 if cp == 2 else 2
        summed = (self.item + self.wide) * self.queries
        own, others = summed + both * (2 * self.item + self.wide), summed + both * (here * self.item + 3 * self.wide)
        if self.shape.rope_scaling == "two-range":
            return others + self._far(self.tokens // 2)
        if self.alters:
            halved = self._scores(self.tokens, self.tokens // 2)
            return max(own + self._scores(self.tokens, self.tokens), others + halved)
        return others + self.item * (self.queries + self.keys)

    def _far(self, num_keys: int) -> int:
        """The sums of far pairs' gradients, and the widest of: q's turned back, by tables; or beside q and k for far
        pairs, changed scores: of near ones in reverse, a square, or of far ones with ``num_keys`` at most.
        """
        piece = min(self.shape.rope_trained_len, self.tokens)
        tables = 7 * self.wide * self.micro_batch * self.tokens * self.shape.head_dim
        turned = 4 * self.wide * self.queries + tables
        reverse = self.item * (10 * self.queries + 2 * self.keys) * piece // self.tokens
        near, far = reverse + self._scores(piece, piece), self._scores(piece, max(0, num_keys))
        beside = self.item * (self.queries + self.keys) + max(near, far)
        return self.wide * (self.queries + self.keys) + max(turned, beside)

    def _scores(self, num_queries: int, num_keys: int) -> int:
        """Of a block: its weights and their gradient, with a clamp the scores it was told of, too; its queries' output
        and that's gradient, narrow and wide; and the keys widened.
        """
        if not self.alters:
            return 0
        if num_keys == 0:
            return 0
        of_query = self.micro_batch * self.num_heads * num_keys
        held = min(MOST_SCORES, num_queries * of_query)
        copies = 2 if self.shape.score_clamp is None else 3
        width = self.micro_batch * self.num_heads * self.shape.head_dim
        rows = held // of_query * width * (2 * self.item + self.wide)
        return copies * self.wide * held + rows + self.wide * self.keys
