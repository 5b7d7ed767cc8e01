"""A cache whose tokens are shared out over cp: each rank attends to the keys that it has, and the parts are merged."""

import torch
from torch import Tensor

from megatron_aquila.kernels.cached_attention import cached_part
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.ops import CausalAttention
from megatron_aquila.kernels.parts import Places, merged_parts
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.parallel.collectives import all_gather
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.sequence import ContextMethod, shard_pieces


class SplitCache:
    """A ``KVCache`` of which each rank of ``cp`` has a share.

    The first forward is that of the prompts: a rank computes its tokens of them by ``attention``, as in training, where
    padding is a document of its own. Later tokens are few, and every rank computes them all; their keys and values are
    kept by one rank after the other, as many by each.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        padding_B: Tensor,
        *,
        cp: Group,
        method: ContextMethod,
        attention: CausalAttention,
        scores: Scores | None = None,
    ) -> None:
        self.capacity, self._padding_B, self.cp, self._method = capacity, padding_B, cp, method
        self.attention, self.scores = attention, Scores() if scores is None else scores
        self.stop = 0
        self._prompts: Places = ()  # which places of them are here, and of those behind them
        self._later = range(0)
        self.documents: Documents | None = None  # what the prompts' attention keeps apart
        self.visible_BST: Tensor | None = None  # which of the keys here the new tokens see; None: those of the prompts
        self.layers = [SplitLayerCache(self) for _ in range(num_layers)]

    @property
    def room(self) -> int:
        """Tokens that this rank will ever keep."""
        return sum(map(len, (*self._prompts, self._later)))

    def extend(self, num_tokens: int) -> Tensor:
        """Make ready for a forward of ``num_tokens`` more, the first time as many as cp can share.

        Returns the positions_BS, 0 for padding, of those of them that this rank computes, which are ``chosen``.
        """
        new = range(self.stop, self.stop + num_tokens)
        self.stop = new.stop
        assert self.stop <= self.capacity, f"{self.stop} tokens in a cache of {self.capacity}"
        padding_B1 = self._padding_B.unsqueeze(1)
        if new.start == 0:
            self._begin(num_tokens)
            self.queries = self.kept = self.keys = self._prompts
            query_S = self._places(self.queries)
        else:
            self.queries, self.kept = (new,), (_both(self._later, new),)
            self.keys = (*self._prompts, _both(self._later, range(self.stop)))
            query_S, key_T = self._places(self.queries), self._places(self.keys)
            self.visible_BST = (key_T >= padding_B1).unsqueeze(1) & (key_T <= query_S.unsqueeze(1))
        self.chosen = query_S - new.start
        return (query_S - padding_B1).clamp(min=0)

    def _begin(self, length: int) -> None:
        """Share out ``length`` tokens of every prompt, and the room behind them."""
        cp = self.cp
        self._prompts = shard_pieces(length, cp=cp.size, rank=cp.rank, method=self._method)
        share = -(-(self.capacity - length) // cp.size)
        first = length + cp.rank * share
        self._later = range(first, first + share)
        paddings = self._padding_B.tolist()
        if any(paddings):
            starts = [row * length for row in range(len(paddings) + 1)]
            bounds = sorted({*starts, *(start + padding for start, padding in zip(starts, paddings, strict=False))})
            on_device = torch.tensor(bounds, dtype=torch.int32, device=self._padding_B.device)
            self.documents = Documents(tuple(bounds), on_device)

    def _places(self, runs: Places) -> Tensor:
        device = self._padding_B.device
        return torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])


def _both(one: range, other: range) -> range:
    """What two ranges share, which may be empty."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


class SplitLayerCache:
    """One layer's share: attends in the place of a causal attention kernel. As ``LayerCache`` keeps far keys, too."""

    def __init__(self, cache: SplitCache) -> None:
        self._cache = cache
        self._held: list[Tensor] = []  # keys, values and, where there are any, far keys

    def __call__(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
        """Keep the new keys and values that are this rank's, and attend to those of all ranks: ``o_SBND``.

        Communicates: the first time what the run's attention does over cp, later an all-gather of the parts over it.
        Without gradients.
        """
        assert documents is None, "a cache holds one document a row"
        cache = self._cache
        keys, values, *far_keys = self._keep(k_SBKD, v_SBKD)
        if cache.visible_BST is None:
            return cache.attention(q_SBND, k_SBKD, v_SBKD, cache.documents)
        o_SBND, lse_SBN = cached_part(
            q_SBND,
            keys,
            values,
            cache.visible_BST,
            queries=cache.queries,
            keys=cache.keys,
            scores=cache.scores,
            k_far_TBKD=far_keys[0] if far_keys else None,
        )
        part = torch.cat([o_SBND, lse_SBN.unsqueeze(-1)], dim=-1)
        parts = all_gather(part.unsqueeze(0), cache.cp)
        return merged_parts(parts[..., :-1], parts[..., -1]).to(q_SBND.dtype)

    def _keep(self, k_SBKD: Tensor, v_SBKD: Tensor) -> list[Tensor]:
        """All keys, values and, where there are any, far keys that are here, the new ones among them."""
        cache = self._cache
        stop = sum(map(len, cache.keys))
        start = stop - sum(map(len, cache.kept))
        if cache.visible_BST is not None:
            first, (own,) = cache.queries[0].start, cache.kept
            k_SBKD, v_SBKD = (x[own.start - first : own.stop - first] for x in (k_SBKD, v_SBKD))
        new = [k_SBKD, v_SBKD]
        if cache.scores.ranges is not None:
            new.append(cache.scores.ranges.far_k(k_SBKD, cache.kept))
        if not self._held:
            self._held = [x.new_empty(cache.room, *x.shape[1:]) for x in new]
        for held, x in zip(self._held, new, strict=True):
            held[start:stop] = x
        return [held[:stop] for held in self._held]
