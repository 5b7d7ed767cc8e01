"""The kernels' cases of the loss: with its projection, and the two passes over a chunk's logits alone."""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Cases, Kernel, Make, Size, Work, draw
from benchmarks.liger import liger_linear_cross_entropy
from megatron_aquila.kernels.cross_entropy import cross_entropy, softmax_gradient_, softmax_statistics
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab_loss import linear_vocab_parallel_cross_entropy
from megatron_aquila.plan.loss_chunks import loss_chunk_tokens

MOST_TOKENS = 2**13  # of the loss: its reference holds their logits in float64
SOFTMAX = ("softmax_statistics", "softmax_gradient")


def _linear_cross_entropy(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    """The mean loss and its gradients, which ours computes in forward: both directions are one."""
    shape = size.shape
    tokens = min(size.seq_len * size.batch, MOST_TOKENS)
    x = draw(device, dtype, tokens, shape.hidden_size)
    weight = draw(device, dtype, shape.padded_vocab_size, shape.hidden_size) / shape.hidden_size**0.5
    labels = torch.randint(shape.vocab_size, (tokens,), device=device)
    tp = ParallelContext.single(device).tp
    placement = Placement(tp=tp, sequence_parallel=False, dtype=dtype, device=device)
    weights = torch.full((tokens, 1), 1 / tokens, device=device)

    def ours(kernel: str) -> Kernel:
        chosen = choose_kernels(device, dtype, forced=dict.fromkeys(SOFTMAX, kernel))

        def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            loss_SB = linear_vocab_parallel_cross_entropy(
                x.unsqueeze(1),
                weight,
                labels.unsqueeze(1),
                weights,
                placement=placement,
                vocab_size=shape.vocab_size,
                statistics=chosen.softmax_statistics,
                gradient=chosen.softmax_gradient,
            )
            return (loss_SB * weights).sum()

        return loss

    def of_real_columns(kernel: Kernel) -> Kernel:
        return lambda x, weight, labels: kernel(x, weight[: shape.vocab_size], labels)  # padding is ours alone

    kernels: dict[str, Make] = {
        "own, in chunks": lambda: ours("own"),
        "triton, in chunks": lambda: ours("triton"),
        "liger-kernel": lambda: of_real_columns(liger_linear_cross_entropy()),
        "torch's linear_cross_entropy": lambda: of_real_columns(F.linear_cross_entropy),  # from 2.13 on
    }
    return Case(
        op="linear_cross_entropy",
        reference=lambda x, weight, labels: cross_entropy(x @ weight.T, labels, vocab_size=shape.vocab_size).mean(),
        inputs=(x, weight),
        call=lambda kernel, x, weight: (kernel(x, weight, labels),),
        both=Work(6 * tokens * shape.vocab_size * shape.hidden_size, "TFLOP/s"),
        kernels=kernels,
        gradients=(torch.ones((), device=device),),
    )


def _chunk(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The logits of a chunk of tokens, and their labels, all of which are this rank's."""
    columns, tokens = size.shape.padded_vocab_size, size.seq_len * size.batch
    rows = loss_chunk_tokens(tokens, row_bytes=columns * dtype.itemsize)
    labels = torch.randint(size.shape.vocab_size, (rows,), device=device)
    return draw(device, dtype, rows, columns), (labels, torch.ones_like(labels, dtype=torch.bool))


def _softmax_statistics(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    logits, labels = _chunk(size, device, dtype)
    return Case(
        op="softmax_statistics",
        reference=softmax_statistics,
        inputs=(logits,),
        call=lambda kernel, logits: (kernel(logits, *labels, num_real=size.shape.vocab_size),),
        forward=Work(logits.nbytes),
    )


def _softmax_gradient(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    logits, labels = _chunk(size, device, dtype)
    log_sum = softmax_statistics(logits, *labels, num_real=size.shape.vocab_size)[0]

    def call(kernel: Kernel, logits: Tensor, log_sum: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        kernel(logits, *labels, log_sum, weights, num_real=size.shape.vocab_size)
        return (logits,)

    return Case(
        op="softmax_gradient",
        reference=softmax_gradient_,
        inputs=(logits, log_sum, torch.rand_like(log_sum)),
        call=call,
        forward=Work(2 * logits.nbytes),
    )


LOSS_CASES: Cases = MappingProxyType(
    {
        "linear_cross_entropy": _linear_cross_entropy,
        "softmax_statistics": _softmax_statistics,
        "softmax_gradient": _softmax_gradient,
    }
)
