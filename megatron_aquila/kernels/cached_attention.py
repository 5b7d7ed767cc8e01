"""Attention of new tokens to all that came before them, kept in a cache; where rows began later, to less."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype, multiplies_widened
from megatron_aquila.kernels.scores import Scores


def cached_attention_reference(
    q_SBND: Tensor,
    k_TBKD: Tensor,
    v_TBKD: Tensor,
    visible_BST: Tensor | None = None,
    *,
    scores: Scores = Scores(),
    k_far_TBKD: Tensor | None = None,
) -> Tensor:
    """Softmax of the scaled scores of the T cached tokens times their values: ``o_SBND``.

    The S queries are the last S of the T tokens. ``visible_BST``: which of them each query sees, at least itself; None:
    all up to itself. ``scores``: what is done to them; distances are those of the cache. ``k_far_TBKD``: the keys for
    far pairs, where they are kept, too. Computed in ``compute_dtype`` and rounded once.
    """
    wide, group = compute_dtype(q_SBND.dtype), q_SBND.shape[2] // k_TBKD.shape[2]
    num_new, num_tokens = q_SBND.shape[0], k_TBKD.shape[0]
    k_TBND, v_TBND = (x.to(wide).repeat_interleave(group, dim=2) for x in (k_TBKD, v_TBKD))
    new, every = (range(num_tokens - num_new, num_tokens),), (range(num_tokens),)
    if k_far_TBKD is not None:
        k_far_TBKD = k_far_TBKD.to(wide).repeat_interleave(group, dim=2)
    scores_BNST = scores.of(q_SBND.to(wide), k_TBND, new, every, k_far_TBND=k_far_TBKD)
    if visible_BST is None:
        visible_BST = causal_ST(num_new, num_tokens, q_SBND.device).unsqueeze(0)
    weights_BNST = scores_BNST.masked_fill(~visible_BST.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights_BNST, v_TBND).to(q_SBND.dtype)


def cached_attention(q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, visible_BST: Tensor | None = None) -> Tensor:
    """``cached_attention_reference`` by torch's own kernels."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_TBKD, v_TBKD))
    if multiplies_widened(q):
        q, k, v = (x.to(compute_dtype(x.dtype)) for x in (q, k, v))
    if visible_BST is None and q.shape[2] > 1:
        visible_BST = causal_ST(q.shape[2], k.shape[2], q.device).unsqueeze(0)
    mask = None if visible_BST is None else visible_BST.unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]
    o_BNSD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return o_BNSD.permute(2, 0, 1, 3).to(q_SBND.dtype)


def causal_ST(num_new: int, num_tokens: int, device: torch.device) -> Tensor:
    """Which of ``num_tokens`` each of the last ``num_new`` sees: those up to itself. Bool."""
    return torch.ones(num_new, num_tokens, dtype=torch.bool, device=device).tril(num_tokens - num_new)
