"""The loss of each token, plain: what ``parallel.vocab.vocab_parallel_cross_entropy`` is measured against."""

from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype


def cross_entropy(logits_SBV: Tensor, labels_SB: Tensor, *, vocab_size: int) -> Tensor:
    """``-log softmax(logits)[label]`` in nats: ``loss_SB`` in ``compute_dtype``.

    Columns from ``vocab_size`` on are padding and take no part.
    """
    logits = logits_SBV[..., :vocab_size].to(compute_dtype(logits_SBV.dtype))
    return logits.logsumexp(-1) - logits.gather(-1, labels_SB.unsqueeze(-1)).squeeze(-1)
