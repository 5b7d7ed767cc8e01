"""Each token's largest logit over a vocabulary that is split over ranks, for the max-z loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.cross_entropy import top_statistics
from megatron_aquila.kernels.precision import apply
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.vocab import num_real_columns


@dataclass(frozen=True, slots=True)
class Top:
    """Of each token the largest logit, and how many columns of the whole vocabulary have it: these share its gradient,
    so that no layout prefers one of them.
    """

    logit: Tensor
    count: Tensor

    @classmethod
    def of_ranks(cls, logits_TR: Tensor, counts_TR: Tensor) -> "Top":
        """From each tp rank's own. Local."""
        logit = logits_TR.amax(0)
        return cls(logit, counts_TR.where(logits_TR == logit, 0).sum(0))


class _MaxLogit(torch.autograd.Function):
    """Saves the logits as they came, and two numbers a token."""

    @staticmethod
    def forward(ctx: Any, logits_SBVt: Tensor, tp: Group, num_real: int) -> Tensor:
        mine, count = top_statistics(logits_SBVt.flatten(0, -2), num_real=num_real)
        top = all_reduce_(mine.clone(), tp, "max")
        count = all_reduce_(count.where(mine == top, 0), tp)
        ctx.save_for_backward(logits_SBVt, top, count)
        ctx.num_real = num_real
        return top.view(logits_SBVt.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None]:
        logits_SBVt, top, count = ctx.saved_tensors
        shares = (grad_SB / count.view_as(grad_SB)).unsqueeze(-1)
        grad = torch.zeros_like(logits_SBVt)  # padded columns stay exactly zero
        real, is_top = grad[..., : ctx.num_real], logits_SBVt[..., : ctx.num_real] == top.view_as(grad_SB).unsqueeze(-1)
        real.copy_(shares.where(is_top, 0))
        return grad, None, None


def vocab_parallel_max(logits_SBVt: Tensor, *, tp: Group, vocab_size: int) -> Tensor:
    """Each token's largest logit, ``top_SB`` in ``compute_dtype``, equal on all tp ranks.

    Forward: two all-reduces of S x B values (maximum; how many have it). Backward: local; columns that tie share the
    gradient.
    """
    return apply(_MaxLogit, logits_SBVt, tp, num_real_columns(logits_SBVt.shape[-1], tp, vocab_size))
