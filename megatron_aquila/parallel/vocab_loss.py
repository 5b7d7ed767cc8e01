"""The output projection and the loss in one: at no time do the logits of more than a chunk of tokens exist.

A chunk's logits are turned into their gradient, that into the gradients of the projection's input and weight, and then
they are gone, all of it in forward. So forward must know what each token's loss will be multiplied with; backward only
hands over what is there. The other ways to keep no logits cost more: computing them again in backward is one product
in four, 1.9 % of the 7B's FLOPs; keeping them in 16 bits is 1.5 GiB for the 7B's 8,192 tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.cross_entropy import softmax_gradient_, softmax_statistics
from megatron_aquila.kernels.ops import SoftmaxGradient, SoftmaxStatistics
from megatron_aquila.kernels.precision import apply, matmul
from megatron_aquila.kernels.products import NATIVE
from megatron_aquila.kernels.unit_rows import UnitRowProducts, through_unit_rows_
from megatron_aquila.kernels.unit_rows import unit_rows as rows_of_length_1
from megatron_aquila.kernels.weight_gradient import accumulate_weight_gradient_
from megatron_aquila.parallel.collectives import all_gather, all_reduce_, reduce_scatter
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.layers import ColumnParallelLinear
from megatron_aquila.parallel.max_logit import Top, vocab_parallel_max
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab import local_columns, num_real_columns, vocab_parallel_cross_entropy
from megatron_aquila.plan.loss_chunks import loss_chunk_tokens

OTHER_WEIGHTS = "the loss was differentiated with other weights of its tokens than forward was told"


class VocabParallelOutput(ColumnParallelLinear):
    """Output projection split over the vocabulary, with the loss: ``weight`` is (padded_vocab_size / tp, H), unfilled.

    ``chunk_tokens``: of how many tokens logits exist at once; None as many as ``plan.loss_chunks`` says, 0 all of them,
    which are then kept from forward to backward. ``unit_rows``: every row is used at length 1. ``max_z_loss``: what a
    token's largest logit squared is multiplied with, beside its loss. ``statistics`` and ``gradient``: the kernels that
    make a loss of a chunk's logits.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        padded_vocab_size: int,
        *,
        placement: Placement,
        chunk_tokens: int | None = None,
        unit_rows: bool = False,
        max_z_loss: float = 0.0,
        statistics: SoftmaxStatistics = softmax_statistics,
        gradient: SoftmaxGradient = softmax_gradient_,
    ) -> None:
        # Logits are what the loss is taken of: their product stays in the type of the activations.
        super().__init__(hidden_size, padded_vocab_size, placement=replace(placement, products=NATIVE))
        if unit_rows:
            self.placement = replace(placement, products=UnitRowProducts(self.weight))
        self.vocab_size, self.chunk_tokens = vocab_size, chunk_tokens
        self.unit_rows, self.max_z_loss = unit_rows, max_z_loss
        self.statistics, self.gradient = statistics, gradient

    def forward(self, x: Tensor, labels_SB: Tensor | None = None, token_weights_SB: Tensor | None = None) -> Tensor:
        """x_StBH | x_SBH -> loss_SB in nats, equal on all tp ranks; without labels logits_SBVt.

        With a max-z loss it is (2, S, B): the loss, and what is added to it. Both are weighted alike.
        ``token_weights_SB``: what each token's loss is multiplied with in what is differentiated. Where that is not
        known, and there is something to differentiate, all logits are kept. Communicates as
        ``linear_vocab_parallel_cross_entropy``, or as the linear and ``vocab_parallel_cross_entropy``.
        """
        if labels_SB is None:
            return super().forward(x)
        if self.chunk_tokens == 0 or (token_weights_SB is None and torch.is_grad_enabled()):
            return self._loss_of_all(super().forward(x), labels_SB)
        return linear_vocab_parallel_cross_entropy(
            x,
            self.weight,
            labels_SB,
            token_weights_SB,
            placement=self.placement,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
            unit_rows=self.unit_rows,
            max_z_loss=self.max_z_loss,
            statistics=self.statistics,
            gradient=self.gradient,
        )

    def _loss_of_all(self, logits_SBVt: Tensor, labels_SB: Tensor) -> Tensor:
        tp, vocab_size = self.placement.tp, self.vocab_size
        loss_SB = vocab_parallel_cross_entropy(logits_SBVt, labels_SB, tp=tp, vocab_size=vocab_size)
        if self.max_z_loss == 0:
            return loss_SB
        top_SB = vocab_parallel_max(logits_SBVt, tp=tp, vocab_size=vocab_size)
        return torch.stack((loss_SB, self.max_z_loss * top_SB.square()))


def linear_vocab_parallel_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels_SB: Tensor,
    token_weights_SB: Tensor | None,
    *,
    placement: Placement,
    vocab_size: int,
    chunk_tokens: int | None = None,
    unit_rows: bool = False,
    max_z_loss: float = 0.0,
    statistics: SoftmaxStatistics = softmax_statistics,
    gradient: SoftmaxGradient = softmax_gradient_,
) -> Tensor:
    """``-log softmax(x @ weight.T)[label]`` of each token in nats: ``loss_SB`` in ``compute_dtype``.

    With ``max_z_loss`` z it is (2, S, B), beside that z times the largest logit squared; with ``unit_rows`` the
    weight's rows are used at length 1.

    ``(loss_SB * token_weights_SB).sum()`` is what may be differentiated, and nothing else: anything else raises
    ``RuntimeError`` in backward, on CUDA when the device gets there. Without weights nothing is. Weights stand in the
    loss's type. The weight's gradient is added up as forward goes and counts from its backward on, or when it is paid.

    Forward: all-gather of x, St -> S, under sequence parallel; an all-gather of two numbers a token each chunk, with a
    max-z loss of four; where something is differentiated a reduce-scatter of x's gradient, S -> St, under sequence
    parallel, else its all-reduce. Backward: local.
    """
    vocabulary = _Vocabulary(placement.tp, vocab_size, unit_rows, max_z_loss, statistics, gradient)
    if token_weights_SB is None or not torch.is_grad_enabled():
        x_SBH = all_gather(x, placement.tp) if placement.sequence_parallel else x
        chunks = zip(*_in_chunks(chunk_tokens, weight, x_SBH, labels_SB), strict=True)
        used = vocabulary.used(weight)
        return vocabulary.joined([_loss(x_RH, used, labels_R, vocabulary) for x_RH, labels_R in chunks], labels_SB)
    return apply(_LinearCrossEntropy, x, weight, labels_SB, token_weights_SB, placement, vocabulary, chunk_tokens)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What a chunk's loss depends on beside its operands."""

    tp: Group
    vocab_size: int
    unit_rows: bool
    max_z_loss: float
    statistics: SoftmaxStatistics
    gradient: SoftmaxGradient

    def used(self, weight: Tensor) -> Tensor:
        """The weight as it is multiplied with."""
        return rows_of_length_1(weight) if self.unit_rows else weight

    def losses(self, found: "_Statistics") -> Tensor:
        """Of one chunk loss_R, or (2, R) with the max-z loss."""
        loss_R = found.log_sum_R - found.label_R
        return loss_R if found.top is None else torch.stack((loss_R, self.max_z_loss * found.top.logit.square()))

    def joined(self, losses: list[Tensor], labels_SB: Tensor) -> Tensor:
        """All chunks' losses, (S, B) or (2, S, B)."""
        whole = torch.cat(losses, dim=-1)
        return whole.view(*whole.shape[:-1], *labels_SB.shape)


@dataclass(frozen=True, slots=True)
class _Statistics:
    """Over the whole vocabulary: each token's logarithm of the sum of exponentials, its label's logit, and where there
    is a max-z loss its largest.
    """

    log_sum_R: Tensor
    label_R: Tensor
    top: Top | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of x, and where the weight's is not added up elsewhere, that."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        labels_SB: Tensor,
        token_weights_SB: Tensor,
        placement: Placement,
        vocabulary: _Vocabulary,
        chunk_tokens: int | None,
    ) -> Tensor:
        tp, sequence_parallel = placement.tp, placement.sequence_parallel
        x_SBH = all_gather(x, tp) if sequence_parallel else x
        grad_x_SBH = torch.empty_like(x_SBH, memory_format=torch.contiguous_format)
        used, grad_weight = vocabulary.used(weight), placement.weight_grads.begin_sum(weight)
        grad_used = grad_weight
        if grad_weight is not None and vocabulary.unit_rows:
            grad_used = torch.zeros_like(grad_weight)
        chunks = _in_chunks(chunk_tokens, weight, x_SBH, grad_x_SBH, labels_SB, token_weights_SB)
        losses = [
            _loss_and_gradients_(x_RH, grad_x_RH, labels_R, weights_R, used, grad_used, vocabulary)
            for x_RH, grad_x_RH, labels_R, weights_R in zip(*chunks, strict=True)
        ]
        if grad_weight is not None and grad_used is not None and vocabulary.unit_rows:
            grad_weight.add_(through_unit_rows_(grad_used, weight))
        ctx.grad_x = reduce_scatter(grad_x_SBH, tp) if sequence_parallel else all_reduce_(grad_x_SBH, tp)
        ctx.save_for_backward(weight, token_weights_SB)
        ctx.grad_weight, ctx.weight_grads = grad_weight, placement.weight_grads
        return vocabulary.joined(losses, labels_SB)

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        weight, token_weights_SB = ctx.saved_tensors
        torch._assert_async((grad_SB == token_weights_SB).all(), OTHER_WEIGHTS)
        grad_weight = ctx.weight_grads.end_sum(weight, ctx.grad_weight)
        grad_x, ctx.grad_x, ctx.grad_weight = ctx.grad_x, None, None
        return grad_x, grad_weight, None, None, None, None, None


def _in_chunks(chunk_tokens: int | None, weight: Tensor, *of_tokens_SB: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor's chunks; tokens are the two first dims as one."""
    num_tokens = of_tokens_SB[0].shape[:2].numel()
    row_bytes = weight.shape[0] * weight.element_size()
    size = loss_chunk_tokens(num_tokens, row_bytes=row_bytes, wanted=chunk_tokens)
    return [torch.split(of_token.flatten(0, 1), size) for of_token in of_tokens_SB]


def _loss(x_RH: Tensor, used: Tensor, labels_R: Tensor, vocabulary: _Vocabulary) -> Tensor:
    """One chunk's losses. Communicates: one all-gather of two numbers a token, or four."""
    return vocabulary.losses(_statistics(matmul(x_RH, used.T), labels_R, vocabulary))


def _loss_and_gradients_(
    x_RH: Tensor,
    grad_x_RH: Tensor,
    labels_R: Tensor,
    token_weights_R: Tensor,
    used: Tensor,
    grad_used: Tensor | None,
    vocabulary: _Vocabulary,
) -> Tensor:
    """The same, with this rank's part of x's gradient written to ``grad_x_RH`` and the weight's added to its sum."""
    tp = vocabulary.tp
    logits_RV = matmul(x_RH, used.T)
    found = _statistics(logits_RV, labels_R, vocabulary)
    num_real = num_real_columns(used.shape[0], tp, vocabulary.vocab_size)
    columns_R, is_mine_R = local_columns(labels_R, used.shape[0], num_real, tp)
    top = found.top
    vocabulary.gradient(
        logits_RV,
        columns_R,
        is_mine_R,
        found.log_sum_R,
        token_weights_R,
        num_real=num_real,
        top=() if top is None else (top.logit, 2 * vocabulary.max_z_loss * top.logit / top.count),
    )
    grad_x_RH.copy_(matmul(logits_RV, used))
    if grad_used is not None:
        accumulate_weight_gradient_(grad_used, logits_RV, x_RH)
    return vocabulary.losses(found)


def _statistics(logits_RV: Tensor, labels_R: Tensor, vocabulary: _Vocabulary) -> _Statistics:
    tp, has_top = vocabulary.tp, vocabulary.max_z_loss > 0
    num_real = num_real_columns(logits_RV.shape[1], tp, vocabulary.vocab_size)
    columns_R, is_mine_R = local_columns(labels_R, logits_RV.shape[1], num_real, tp)
    mine = vocabulary.statistics(logits_RV, columns_R, is_mine_R, num_real=num_real, with_top=has_top)
    log_sums, labels, *tops = all_gather(mine, tp).view(tp.size, 4 if has_top else 2, -1).unbind(1)
    top = Top.of_ranks(*tops) if has_top else None
    return _Statistics(log_sums.logsumexp(0), labels.sum(0), top)
