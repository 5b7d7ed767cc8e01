"""The loss of each token: plain, and in the parts that a vocabulary split over ranks leaves to each of them."""

import torch
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype


def cross_entropy(logits_SBV: Tensor, labels_SB: Tensor, *, vocab_size: int) -> Tensor:
    """``-log softmax(logits)[label]`` in nats: ``loss_SB`` in ``compute_dtype``. What the others are measured against.

    Columns from ``vocab_size`` on are padding and take no part.
    """
    logits = logits_SBV[..., :vocab_size].to(compute_dtype(logits_SBV.dtype))
    return logits.logsumexp(-1) - logits.gather(-1, labels_SB.unsqueeze(-1)).squeeze(-1)


def softmax_statistics(
    logits_RV: Tensor, columns_R: Tensor, is_mine_R: Tensor, *, num_real: int, wide_rows: int
) -> Tensor:
    """Of each row the logarithm of the sum of exponentials, and the logit in its column or 0 where it is not mine.

    Two rows of R in ``compute_dtype``; ``wide_rows`` rows of logits are in that type at a time. Columns from
    ``num_real`` on take no part; of none, the logarithm is -inf.
    """
    dtype = compute_dtype(logits_RV.dtype)
    if num_real == 0:
        nothing = torch.zeros(columns_R.shape, dtype=dtype, device=logits_RV.device)
        return torch.stack((nothing - torch.inf, nothing))
    log_sums = [rows[:, :num_real].to(dtype).logsumexp(-1) for rows in torch.split(logits_RV, wide_rows)]
    label_R = logits_RV.gather(-1, columns_R.unsqueeze(-1)).squeeze(-1).to(dtype)
    return torch.stack((torch.cat(log_sums), label_R.where(is_mine_R, 0)))


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
    wide_rows: int,
    top: tuple[Tensor, Tensor] | tuple[()] = (),
) -> None:
    """Replace logits by the gradient of ``(weights * loss).sum()``: ``weights * (softmax - one-hot)``, rounded once.

    ``log_sum_R`` is that over the whole vocabulary. Columns from ``num_real`` on become exactly 0. Where a row's
    largest logit has a loss of its own, ``top`` is that logit and the gradient of each column that has it.
    """
    logits_RV[:, num_real:] = 0
    if num_real == 0:
        return
    per_row = (columns_R, is_mine_R, log_sum_R, weights_R, *top)
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
