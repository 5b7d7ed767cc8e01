"""The vocabulary split over the tensor-parallel group: the look-up at one end of the model, the loss at the other.

Rank t holds rows ``t * Vt : (t + 1) * Vt`` of the padded vocabulary. The last ranks may hold few real rows, or none.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.embedding import embedding
from megatron_aquila.kernels.precision import apply, compute_dtype
from megatron_aquila.parallel.collectives import all_gather, all_reduce_, reduce_from, scatter_sequence
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.placement import Placement


class VocabParallelEmbedding(nn.Module):
    """Look-up in a table split by rows: ``weight`` is (padded_vocab_size / tp, hidden_size), unfilled.

    Ids outside the vocabulary are the loader's to refuse; here they would give zeros.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, *, placement: Placement) -> None:
        super().__init__()
        assert vocab_size <= padded_vocab_size, f"{vocab_size} tokens do not fit in {padded_vocab_size} rows"
        tp_size = placement.tp.size
        assert padded_vocab_size % tp_size == 0, f"{padded_vocab_size} rows do not split over {tp_size} ranks"
        self.placement = placement
        self.weight = placement.weight(padded_vocab_size // tp_size, hidden_size)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """tokens_BS -> x_StBH | x_SBH.

        Forward: reduce-scatter, S -> St, under sequence parallel; else all-reduce. Only one rank's term is not zero, so
        the sum is exact. Backward: all-gather, St -> S, under sequence parallel; else nothing.
        """
        tp = self.placement.tp
        rows, is_mine = local_columns(tokens_BS.T, self.weight.shape[0], self.weight.shape[0], tp)
        x_SBH = embedding(rows, self.weight).where(is_mine.unsqueeze(-1), 0)
        return scatter_sequence(x_SBH, tp) if self.placement.sequence_parallel else reduce_from(x_SBH, tp)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Saves the logits as they came and two numbers a token; the softmax is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, logits_SBVt: Tensor, labels_SB: Tensor, tp: Group, vocab_size: int) -> Tensor:
        num_real = num_real_columns(logits_SBVt.shape[-1], tp, vocab_size)
        real, dtype = logits_SBVt[..., :num_real], compute_dtype(logits_SBVt.dtype)
        top_SB = real.amax(-1).to(dtype) if num_real > 0 else real.new_full(labels_SB.shape, -torch.inf, dtype=dtype)
        top_SB = all_reduce_(top_SB, tp, "max")
        logits = real.to(dtype, copy=True).sub_(top_SB.unsqueeze(-1))  # the only wide copy of the logits
        columns, is_mine = local_columns(labels_SB, logits_SBVt.shape[-1], num_real, tp)
        label_logit = torch.zeros_like(top_SB)
        if num_real > 0:
            label_logit = logits.gather(-1, columns.unsqueeze(-1)).squeeze(-1).where(is_mine, 0)
        label_logit, sum_exp = all_reduce_(torch.stack((label_logit, logits.exp_().sum(-1))), tp).unbind()
        ctx.save_for_backward(logits_SBVt, labels_SB, top_SB, sum_exp)
        ctx.tp, ctx.num_real = tp, num_real
        return sum_exp.log() - label_logit

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None, None, None]:
        logits_SBVt, labels_SB, top_SB, sum_exp = ctx.saved_tensors
        columns, is_mine = local_columns(labels_SB, logits_SBVt.shape[-1], ctx.num_real, ctx.tp)
        grad = torch.zeros(logits_SBVt.shape, dtype=top_SB.dtype, device=top_SB.device)
        real = grad[..., : ctx.num_real]  # the padded columns stay exactly zero
        real.copy_(logits_SBVt[..., : ctx.num_real]).sub_(top_SB.unsqueeze(-1)).exp_().div_(sum_exp.unsqueeze(-1))
        grad.scatter_add_(-1, columns.unsqueeze(-1), -is_mine.to(grad.dtype).unsqueeze(-1))
        return grad.mul_(grad_SB.unsqueeze(-1)).to(logits_SBVt.dtype), None, None, None


def vocab_parallel_cross_entropy(logits_SBVt: Tensor, labels_SB: Tensor, *, tp: Group, vocab_size: int) -> Tensor:
    """``-log softmax(logits)[label]`` of each token in nats: ``loss_SB`` in ``compute_dtype``, equal on all tp ranks.

    Forward: two all-reduces of S x B values (maximum; sum). Backward: local. The columns from ``vocab_size`` on take no
    part in the softmax and get a gradient of exactly zero. Labels outside the vocabulary are the loader's to refuse.
    """
    assert logits_SBVt.shape[-1] * tp.size >= vocab_size, (
        f"{tp.size} shards of {logits_SBVt.shape[-1]} columns do not hold {vocab_size} tokens"
    )
    return apply(_VocabParallelCrossEntropy, logits_SBVt, labels_SB, tp, vocab_size)


def vocab_parallel_argmax(logits_SBVt: Tensor, *, tp: Group, vocab_size: int) -> Tensor:
    """The likeliest token of each place, of equals the first: ``token_SB``, equal on all tp ranks. No gradient.

    Forward: two all-gathers of S x B values.
    """
    logits_SBVt = logits_SBVt.detach()
    num_real = num_real_columns(logits_SBVt.shape[-1], tp, vocab_size)
    if num_real > 0:
        top_SB, column_SB = logits_SBVt[..., :num_real].max(-1)
    else:
        top_SB = logits_SBVt.new_full(logits_SBVt.shape[:-1], -torch.inf)
        column_SB = torch.zeros_like(top_SB, dtype=torch.int64)
    tops, columns = (all_gather(x.unsqueeze(0), tp) for x in (top_SB, column_SB + tp.rank * logits_SBVt.shape[-1]))
    return columns.gather(0, tops.max(0, keepdim=True).indices).squeeze(0)


def num_real_columns(shard_size: int, tp: Group, vocab_size: int) -> int:
    """How many of this rank's columns are tokens; the others are padding."""
    return min(max(vocab_size - tp.rank * shard_size, 0), shard_size)


def local_columns(ids: Tensor, shard_size: int, num_real: int, tp: Group) -> tuple[Tensor, Tensor]:
    """``ids`` as this rank's rows, 0 where another rank holds them, and where this rank does."""
    rows = ids - tp.rank * shard_size
    is_mine = (rows >= 0) & (rows < num_real)
    return rows.where(is_mine, 0), is_mine
