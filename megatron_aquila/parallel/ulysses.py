"""Ulysses: between the projections and attention, tokens and heads change places (Jacobs et al. 2023).

Every rank attends over whole samples with its share of the heads, by any attention there is.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.ops import CausalAttention, ScoredAttention
from megatron_aquila.kernels.precision import apply
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.parallel.collectives import all_to_all
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.sequence import num_shared_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class UlyssesAttention:
    """A ``CausalAttention`` over sequences that are split over ``cp``. ``documents`` are those of whole samples.

    Forward: an all-to-all of q, k and v, one of the output. Backward: the same two. Where there are too few key/value
    heads for the ranks, each goes to several, and its gradients are summed.
    """

    cp: Group
    attention: CausalAttention

    def __call__(
        self,
        q_SBND: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        documents: Documents | None = None,
        *,
        scores: Scores | None = None,
    ) -> Tensor:
        """q_ScBND, k_ScBKD, v_ScBKD -> o_ScBND. Inside, q_SBNcD, k and v of whole samples, and ``scores`` of its heads.

        An attention that was not chosen for changed ``scores`` takes none.
        """
        attend = self.attention
        if scores is not None:
            attend = partial(cast(ScoredAttention, attend), scores=scores.share(self.cp.rank, self.cp.size))
        copies = num_shared_heads(k_SBKD.shape[2], self.cp.size) // k_SBKD.shape[2]
        if copies > 1:
            k_SBKD, v_SBKD = (x.repeat_interleave(copies, dim=2) for x in (k_SBKD, v_SBKD))
        sizes = [x.shape[2] // self.cp.size for x in (q_SBND, k_SBKD, v_SBKD)]
        # each rank's q, k and v heads side by side
        shares = zip(*(x.chunk(self.cp.size, dim=2) for x in (q_SBND, k_SBKD, v_SBKD)), strict=True)
        qkv = torch.cat([x for share in shares for x in share], dim=2)
        q, k, v = apply(_ToHeads, qkv, self.cp).split_with_sizes(sizes, dim=2)
        return apply(_ToTokens, attend(q, k, v, documents), self.cp)


class _ToHeads(torch.autograd.Function):
    """This rank's tokens of all heads -> all tokens of this rank's heads."""

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cp: Group) -> Tensor:
        ctx.cp = cp
        return _to_heads(x_SBND, cp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grad, ctx.cp), None


class _ToTokens(torch.autograd.Function):
    """The way back."""

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cp: Group) -> Tensor:
        ctx.cp = cp
        return _to_tokens(x_SBND, cp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.cp), None


def _to_heads(x_SBND: Tensor, cp: Group) -> Tensor:
    by_rank = torch.unflatten(x_SBND, 2, (cp.size, -1)).movedim(2, 0)
    return all_to_all(by_rank, cp).flatten(0, 1)


def _to_tokens(x_SBND: Tensor, cp: Group) -> Tensor:
    by_rank = all_to_all(torch.unflatten(x_SBND, 0, (cp.size, -1)), cp)
    return by_rank.movedim(0, 2).flatten(2, 3)
