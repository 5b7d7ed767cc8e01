"""The loss of each token: plain, and in the parts that a vocabulary split over ranks leaves to each of them."""

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype

WIDE_ELEMENTS = 2**24  # logits that are widened at a time: all of a chunk would be a step's fullest moment


def cross_entropy(logits_SBV: Tensor, labels_SB: Tensor, *, vocab_size: int) -> Tensor:
    """``-log softmax(logits)[label]`` in nats: ``loss_SB`` in ``compute_dtype``. What the others are measured against.

    Columns from ``vocab_size`` on are padding and take no part.
    """
    logits = logits_SBV[..., :vocab_size].to(compute_dtype(logits_SBV.dtype))
    return logits.logsumexp(-1) - logits.gather(-1, labels_SB.unsqueeze(-1)).squeeze(-1)


def softmax_statistics(
    logits_RV: Tensor,
    columns_R: Tensor,
    is_mine_R: Tensor,
    *,
    num_real: int,
    with_top: bool = False,
    wide_elements: int = WIDE_ELEMENTS,
) -> Tensor:
    """Of each row the logarithm of the sum of exponentials, and the logit in its column or 0 where it is not mine.

    Two rows of R in ``compute_dtype``, ``with_top`` those of ``top_statistics`` below them. As many rows of logits are
    in that type at a time as ``wide_elements`` make. Columns from ``num_real`` on take no part; of none, the logarithm
    is -inf.
    """
    dtype = compute_dtype(logits_RV.dtype)
    if num_real == 0:
        label_R = torch.zeros(columns_R.shape, dtype=dtype, device=logits_RV.device)
        log_sum_R = label_R - torch.inf
    else:
        rows = torch.split(logits_RV, _wide_rows(logits_RV, wide_elements))
        log_sum_R = torch.cat([some[:, :num_real].to(dtype).logsumexp(-1) for some in rows])
        label_R = logits_RV.gather(-1, columns_R.unsqueeze(-1)).squeeze(-1).to(dtype).where(is_mine_R, 0)
    found = torch.stack((log_sum_R, label_R))
    return torch.cat((found, top_statistics(logits_RV, num_real=num_real))) if with_top else found


def softmax_statistics_triton(
    logits_RV: Tensor, columns_R: Tensor, is_mine_R: Tensor, *, num_real: int, with_top: bool = False
) -> Tensor:
    """``softmax_statistics`` by our Triton kernel: one read of the logits, whose columns lie side by side."""
    from megatron_aquila.kernels.triton.cross_entropy import statistics

    return statistics(logits_RV, columns_R, is_mine_R, num_real=num_real, with_top=with_top)


def top_statistics(logits_RV: Tensor, *, num_real: int) -> Tensor:
    """Of each row the largest logit and how many columns have it: two rows of R in ``compute_dtype``.

    Columns from ``num_real`` on take no part; of none, the largest is -inf.
    """
    dtype = compute_dtype(logits_RV.dtype)
    if num_real == 0:
        nothing = torch.zeros(logits_RV.shape[0], dtype=dtype, device=logits_RV.device)
        return torch.stack((nothing - torch.inf, nothing))
    real = logits_RV[:, :num_real]
    top_R = real.amax(-1)
    return torch.stack((top_R.to(dtype), (real == top_R.unsqueeze(-1)).sum(-1).to(dtype)))


def softmax_gradient_(
    logits_RV: Tensor,
    columns_R: Tensor,
    is_mine_R: Tensor,
    log_sum_R: Tensor,
    weights_R: Tensor,
    *,
    num_real: int,
    top: tuple[Tensor, Tensor] | tuple[()] = (),
    wide_elements: int = WIDE_ELEMENTS,
) -> None:
    """Replace logits by the gradient of ``(weights * loss).sum()``: ``weights * (softmax - one-hot)``, rounded once.

    ``log_sum_R`` is that over the whole vocabulary. Columns from ``num_real`` on become exactly 0. Where a row's
    largest logit has a loss of its own, ``top`` is that logit and the gradient of each column that has it.
    """
    logits_RV[:, num_real:] = 0
    if num_real == 0:
        return
    per_row = (columns_R, is_mine_R, log_sum_R, weights_R, *top)
    wide_rows = _wide_rows(logits_RV, wide_elements)
    columns = (torch.split(value.unsqueeze(-1), wide_rows) for value in per_row)
    for rows, column, is_mine, log_sum, weight, *largest in zip(
        torch.split(logits_RV, wide_rows), *columns, strict=True
    ):
        real = rows[:, :num_real]
        shared = largest[1].where(real == largest[0], 0) if largest else None
        grad = real.to(log_sum.dtype).sub_(log_sum).exp_()
        grad.scatter_add_(-1, column, -is_mine.to(grad.dtype))
        if shared is not None:
            grad.add_(shared)
        real.copy_(grad.mul_(weight))


def softmax_gradient_triton_(
    logits_RV: Tensor,
    columns_R: Tensor,
    is_mine_R: Tensor,
    log_sum_R: Tensor,
    weights_R: Tensor,
    *,
    num_real: int,
    top: tuple[Tensor, Tensor] | tuple[()] = (),
) -> None:
    """``softmax_gradient_`` by our Triton kernel: each logit is read once and written once."""
    from megatron_aquila.kernels.triton.cross_entropy import gradient_

    gradient_(logits_RV, columns_R, is_mine_R, log_sum_R, weights_R, num_real=num_real, top=top)


def _wide_rows(logits_RV: Tensor, wide_elements: int) -> int:
    return max(1, wide_elements // logits_RV.shape[1])
