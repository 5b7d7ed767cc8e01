"""Keys and values of the tokens that a stage has seen, so that the next token costs one token."""

import torch
from torch import Tensor

from megatron_aquila.kernels.cached_attention import cached_attention, cached_attention_reference, causal_ST
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.scores import Scores


class KVCache:
    """The caches of a stage's layers, filled by one forward after the other. It is passed, no module holds it.

    Rows of a batch end together: a shorter one begins later, after ``padding_B`` tokens that nobody sees but
    themselves. ``capacity``: tokens of the longest row, padding included. ``scores``: what this rank's heads do to
    theirs.
    """

    def __init__(self, num_layers: int, capacity: int, padding_B: Tensor, *, scores: Scores | None = None) -> None:
        self.capacity, self._padding_B, self.scores = capacity, padding_B, scores
        self._is_padded = bool(padding_B.any())
        self.start = self.stop = 0  # the tokens of the forward under way
        self.visible_BST: Tensor | None = None  # None: each sees all up to itself
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    @property
    def chosen(self) -> slice:
        """Which of the new tokens this rank computes."""
        return slice(None)

    def extend(self, num_tokens: int) -> Tensor:
        """Make ready for a forward of ``num_tokens`` more; returns their positions_BS, 0 for padding."""
        self.start, self.stop = self.stop, self.stop + num_tokens
        assert self.stop <= self.capacity, f"{self.stop} tokens in a cache of {self.capacity}"
        slots = torch.arange(self.stop, device=self._padding_B.device)
        new = slots[self.start :]
        if self._is_padded:
            real_BT = slots >= self._padding_B.unsqueeze(1)
            itself_ST = new.unsqueeze(1) == slots
            up_to_itself_ST = causal_ST(range(self.start, self.stop), self.stop, slots.device)
            self.visible_BST = (real_BT.unsqueeze(1) & up_to_itself_ST) | itself_ST
        return (new - self._padding_B.unsqueeze(1)).clamp(min=0)


class LayerCache:
    """One layer's cache: attends in the place of a causal attention kernel.

    Where pairs are near and far it keeps every key twice, turned to its place and as far pairs take it.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._kept: list[Tensor] = []  # keys, values and, where there are any, far keys

    def __call__(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
        """Keep the new keys and values, and attend to all: ``o_SBND``. Local; without gradients."""
        assert documents is None, "a cache holds one document a row"
        cache, new = self._cache, [k_SBKD, v_SBKD]
        ranges = None if cache.scores is None else cache.scores.ranges
        if ranges is not None:
            new.append(ranges.far_k(k_SBKD, (range(cache.start, cache.stop),)))
        if not self._kept:
            self._kept = [x.new_empty(cache.capacity, *x.shape[1:]) for x in new]
        for kept, x in zip(self._kept, new, strict=True):
            kept[cache.start : cache.stop] = x
        keys, values, *far_keys = (kept[: cache.stop] for kept in self._kept)
        if cache.scores is None:
            return cached_attention(q_SBND, keys, values, visible_BST=cache.visible_BST)
        k_far = far_keys[0] if far_keys else None
        return cached_attention_reference(
            q_SBND, keys, values, cache.visible_BST, scores=cache.scores, k_far_TBKD=k_far
        )
