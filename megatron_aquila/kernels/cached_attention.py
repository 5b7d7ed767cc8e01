"""Attention of new tokens to all that came before them, kept in a cache; where rows began later, to less."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.attention_blocks import MOST_SCORES
from megatron_aquila.kernels.parts import Part, Places
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
    far pairs, where they are kept, too. Computed in ``compute_dtype`` and rounded once, for blocks of queries with
    at most ``MOST_SCORES`` scores.
    """
    wide, group = compute_dtype(q_SBND.dtype), q_SBND.shape[2] // k_TBKD.shape[2]
    (num_new, num_samples, num_heads, _), num_tokens = q_SBND.shape, k_TBKD.shape[0]
    k_TBND, v_TBND = (x.to(wide).repeat_interleave(group, dim=2) for x in (k_TBKD, v_TBKD))
    every = (range(num_tokens),)
    if k_far_TBKD is not None:
        k_far_TBKD = k_far_TBKD.to(wide).repeat_interleave(group, dim=2)
    elif scores.ranges is not None:
        k_far_TBKD = scores.ranges.far_k(k_TBND, every)
    step, outs = max(1, MOST_SCORES // (num_samples * num_heads * num_tokens)), list[Tensor]()
    for start in range(0, num_new, step):
        q = q_SBND[start : start + step]
        first = num_tokens - num_new + start
        places = range(first, first + len(q))
        held_BNST = scores.of(q.to(wide), k_TBND, (places,), every, k_far_TBND=k_far_TBKD)
        if visible_BST is None:
            hidden_BST = ~causal_ST(places, num_tokens, q.device).unsqueeze(0)
        else:
            hidden_BST = ~visible_BST[:, start : start + step]
        weights_BNST = held_BNST.masked_fill_(hidden_BST.unsqueeze(1), float("-inf")).softmax(dim=-1)
        outs.append(torch.einsum("bnst,tbnd->sbnd", weights_BNST, v_TBND).to(q.dtype))
    return torch.cat(outs)


def cached_attention(q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, visible_BST: Tensor | None = None) -> Tensor:
    """``cached_attention_reference`` by torch's own kernels."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_TBKD, v_TBKD))
    if multiplies_widened(q):
        q, k, v = (x.to(compute_dtype(x.dtype)) for x in (q, k, v))
    if visible_BST is None and q.shape[2] > 1:
        visible_BST = causal_ST(range(k.shape[2] - q.shape[2], k.shape[2]), k.shape[2], q.device).unsqueeze(0)
    mask = None if visible_BST is None else visible_BST.unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]
    o_BNSD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return o_BNSD.permute(2, 0, 1, 3).to(q_SBND.dtype)


def cached_part(
    q_SBND: Tensor,
    k_TBKD: Tensor,
    v_TBKD: Tensor,
    visible_BST: Tensor,
    *,
    queries: Places,
    keys: Places,
    scores: Scores = Scores(),
    k_far_TBKD: Tensor | None = None,
) -> Part:
    """The part of ``cached_attention_reference`` that T of the cached tokens have, those at the places ``keys``.

    A query that sees none of them gets the part that has no keys. For few queries: all scores exist at once.
    """
    wide, group = compute_dtype(q_SBND.dtype), q_SBND.shape[2] // k_TBKD.shape[2]
    k_TBND, v_TBND = (x.to(wide).repeat_interleave(group, dim=2) for x in (k_TBKD, v_TBKD))
    if k_far_TBKD is not None:
        k_far_TBKD = k_far_TBKD.to(wide).repeat_interleave(group, dim=2)
    held_BNST = scores.of(q_SBND.to(wide), k_TBND, queries, keys, k_far_TBND=k_far_TBKD)
    held_BNST.masked_fill_(~visible_BST.unsqueeze(1), float("-inf"))
    lse_BNS = held_BNST.logsumexp(-1)
    finite_BNS1 = lse_BNS.clamp(min=torch.finfo(wide).min).unsqueeze(-1)  # what is minus infinity stays so below it
    o_SBND = torch.einsum("bnst,tbnd->sbnd", held_BNST.sub_(finite_BNS1).exp_(), v_TBND)
    return o_SBND, lse_BNS.permute(2, 0, 1)


def causal_ST(places: range, num_tokens: int, device: torch.device) -> Tensor:
    """Which of ``num_tokens`` each one of those at ``places`` sees: those up to itself. Bool."""
    return torch.ones(len(places), num_tokens, dtype=torch.bool, device=device).tril(places.start)
