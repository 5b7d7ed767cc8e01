"""The output projection and the loss in one: at no time do the logits of more than a chunk of tokens exist.

A chunk's logits are turned into their gradient, that into the gradients of the projection's input and weight, and then
they are gone, all of it in forward. So forward must know what each token's loss will be multiplied with; backward only
hands over what is there. The other ways to keep no logits cost more: computing them again in backward is one product
in four, 1.9 % of the 7B's FLOPs; keeping them in 16 bits is 1.5 GiB for the 7B's 8,192 tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_aquila.kernels.cross_entropy import softmax_gradient_, softmax_statistics
from megatron_aquila.kernels.precision import apply, matmul
from megatron_aquila.kernels.products import NATIVE
from megatron_aquila.kernels.weight_gradient import accumulate_weight_gradient_
from megatron_aquila.parallel.collectives import all_gather, all_reduce_, reduce_scatter
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.layers import ColumnParallelLinear
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab import local_columns, num_real_columns, vocab_parallel_cross_entropy
from megatron_aquila.plan.loss_chunks import loss_chunk_tokens, wide_rows

OTHER_WEIGHTS = "the loss was differentiated with other weights of its tokens than forward was told"


class VocabParallelOutput(ColumnParallelLinear):
    """Output projection split over the vocabulary, with the loss: ``weight`` is (padded_vocab_size / tp, H), unfilled.

    ``chunk_tokens``: of how many tokens logits exist at once; None as many as ``plan.loss_chunks`` says, 0 all of them,
    which are then kept from forward to backward.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        padded_vocab_size: int,
        *,
        placement: Placement,
        chunk_tokens: int | None = None,
    ) -> None:
        # Logits are what the loss is taken of: their product stays in the type of the activations.
        super().__init__(hidden_size, padded_vocab_size, placement=replace(placement, products=NATIVE))
        self.vocab_size, self.chunk_tokens = vocab_size, chunk_tokens

    def forward(self, x: Tensor, labels_SB: Tensor | None = None, token_weights_SB: Tensor | None = None) -> Tensor:
        """x_StBH | x_SBH -> loss_SB in nats, equal on all tp ranks; without labels logits_SBVt.

        ``token_weights_SB``: what each token's loss is multiplied with in what is differentiated. Where that is not
        known, and there is something to differentiate, all logits are kept. Communicates as
        ``linear_vocab_parallel_cross_entropy``, or as the linear and ``vocab_parallel_cross_entropy``.
        """
        if labels_SB is None:
            return super().forward(x)
        if self.chunk_tokens == 0 or (token_weights_SB is None and torch.is_grad_enabled()):
            logits = super().forward(x)
            return vocab_parallel_cross_entropy(logits, labels_SB, tp=self.placement.tp, vocab_size=self.vocab_size)
        return linear_vocab_parallel_cross_entropy(
            x,
            self.weight,
            labels_SB,
            token_weights_SB,
            placement=self.placement,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
        )


def linear_vocab_parallel_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels_SB: Tensor,
    token_weights_SB: Tensor | None,
    *,
    placement: Placement,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """``-log softmax(x @ weight.T)[label]`` of each token in nats: ``loss_SB`` in ``compute_dtype``.

    ``(loss_SB * token_weights_SB).sum()`` is what may be differentiated, and nothing else: anything else raises
    ``RuntimeError`` in backward, on CUDA when the device gets there. Without weights nothing is. Weights stand in the
    loss's type. The weight's gradient is added up as forward goes and counts from its backward on, or when it is paid.

    Forward: all-gather of x, St -> S, under sequence parallel; an all-gather of two numbers a token each chunk; where
    something is differentiated a reduce-scatter of x's gradient, S -> St, under sequence parallel, else its all-reduce.
    Backward: local.
    """
    if token_weights_SB is None or not torch.is_grad_enabled():
        x_SBH = all_gather(x, placement.tp) if placement.sequence_parallel else x
        chunks = zip(*_in_chunks(chunk_tokens, weight, x_SBH, labels_SB), strict=True)
        losses = [_loss(x_RH, weight, labels_R, placement.tp, vocab_size) for x_RH, labels_R in chunks]
        return torch.cat(losses).view(labels_SB.shape)
    return apply(_LinearCrossEntropy, x, weight, labels_SB, token_weights_SB, placement, vocab_size, chunk_tokens)


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
        vocab_size: int,
        chunk_tokens: int | None,
    ) -> Tensor:
        tp, sequence_parallel = placement.tp, placement.sequence_parallel
        x_SBH = all_gather(x, tp) if sequence_parallel else x
        grad_x_SBH = torch.empty_like(x_SBH, memory_format=torch.contiguous_format)
        grad_weight = placement.weight_grads.begin_sum(weight)
        chunks = _in_chunks(chunk_tokens, weight, x_SBH, grad_x_SBH, labels_SB, token_weights_SB)
        losses = [
            _loss_and_gradients_(x_RH, grad_x_RH, labels_R, weights_R, weight, grad_weight, tp, vocab_size)
            for x_RH, grad_x_RH, labels_R, weights_R in zip(*chunks, strict=True)
        ]
        ctx.grad_x = reduce_scatter(grad_x_SBH, tp) if sequence_parallel else all_reduce_(grad_x_SBH, tp)
        ctx.save_for_backward(weight, token_weights_SB)
        ctx.grad_weight, ctx.weight_grads = grad_weight, placement.weight_grads
        return torch.cat(losses).view(labels_SB.shape)

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


def _loss(x_RH: Tensor, weight: Tensor, labels_R: Tensor, tp: Group, vocab_size: int) -> Tensor:
    """One chunk's loss_R. Communicates: one all-gather of two numbers a token."""
    log_sum_R, label_R = _statistics(matmul(x_RH, weight.T), labels_R, tp, vocab_size)
    return log_sum_R - label_R


def _loss_and_gradients_(
    x_RH: Tensor,
    grad_x_RH: Tensor,
    labels_R: Tensor,
    token_weights_R: Tensor,
    weight: Tensor,
    grad_weight: Tensor | None,
    tp: Group,
    vocab_size: int,
) -> Tensor:
    """The same, with this rank's part of x's gradient written to ``grad_x_RH`` and the weight's added to its sum."""
    logits_RV = matmul(x_RH, weight.T)
    log_sum_R, label_R = _statistics(logits_RV, labels_R, tp, vocab_size)
    num_real = num_real_columns(weight.shape[0], tp, vocab_size)
    columns_R, is_mine_R = local_columns(labels_R, weight.shape[0], num_real, tp)
    softmax_gradient_(
        logits_RV,
        columns_R,
        is_mine_R,
        log_sum_R,
        token_weights_R,
        num_real=num_real,
        wide_rows=wide_rows(logits_RV.shape[1]),
    )
    grad_x_RH.copy_(matmul(logits_RV, weight))
    if grad_weight is not None:
        accumulate_weight_gradient_(grad_weight, logits_RV, x_RH)
    return log_sum_R - label_R


def _statistics(logits_RV: Tensor, labels_R: Tensor, tp: Group, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Over the whole vocabulary: each token's logarithm of the sum of exponentials, and its label's logit."""
    num_real = num_real_columns(logits_RV.shape[1], tp, vocab_size)
    columns_R, is_mine_R = local_columns(labels_R, logits_RV.shape[1], num_real, tp)
    mine = softmax_statistics(
        logits_RV, columns_R, is_mine_R, num_real=num_real, wide_rows=wide_rows(logits_RV.shape[1])
    )
    log_sums, labels = all_gather(mine, tp).view(tp.size, 2, -1).unbind(1)
    return log_sums.logsumexp(0), labels.sum(0)
