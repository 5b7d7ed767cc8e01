"""A part of a softmax, over some of the keys, and how parts are put together.

A part gives its output ``o`` and ``lse``, each query's logarithm of the sum of the exponentials of its scores. Parts
are merged in ``compute_dtype``: ``o = sum(o_i exp(lse_i - lse))`` with ``lse = log(sum(exp(lse_i)))``. Backward takes
the merged ``o`` and ``lse`` and gives each block's share of the gradients, which are sums over the blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import apply, compute_dtype

Part = tuple[Tensor, Tensor]  # o_SBND and lse_SBN
Grads = tuple[Tensor, Tensor, Tensor]  # of q_SBND, k_SBKD and v_SBKD
Places = tuple[range, ...]  # of tokens in their sample, run by run


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Queries that meet keys of their document: all pairs, or causally, where both are the same tokens.

    ``queries`` and ``keys``: their places, which scores that change with distance ask for. No key of one that is not
    causal is later than a query.
    """

    is_causal: bool
    queries: Places = ()
    keys: Places = ()


class MeetingKernel(Protocol):
    """Attention of queries over the keys that they meet. ``lse`` is in ``compute_dtype``, all else in the type of q or
    wider.
    """

    def attend(self, q_SBND: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, meeting: Meeting) -> Part:
        """The part of these keys."""
        ...

    def add_gradients_(
        self,
        grads: Grads,
        grad_o: Tensor,
        q_SBND: Tensor,
        k_TBKD: Tensor,
        v_TBKD: Tensor,
        o: Tensor,
        lse_SBN: Tensor,
        meeting: Meeting,
    ) -> None:
        """Add their share of the gradients to ``grads``, in place. ``o`` and ``lse_SBN`` are those of all keys."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """A meeting as slices of a microbatch."""

    samples: slice
    queries: slice
    keys: slice
    meeting: Meeting


def empty_sum(q_SBND: Tensor) -> Part:
    """The part that has no keys: what others are merged into."""
    wide = compute_dtype(q_SBND.dtype)
    return q_SBND.new_zeros(q_SBND.shape, dtype=wide), q_SBND.new_full(q_SBND.shape[:-1], -torch.inf, dtype=wide)


def merge_(total: Part, part: Part) -> None:
    """Add the keys of ``part`` to those of ``total``, of the same queries, in place."""
    (o, lse), (o_part, lse_part) = total, part
    merged = torch.logaddexp(lse, lse_part)
    o.mul_((lse - merged).exp_().unsqueeze(-1)).add_(o_part * (lse_part - merged).exp_().unsqueeze(-1))
    lse.copy_(merged)


def merged_parts(o_PSBND: Tensor, lse_PSBN: Tensor) -> Tensor:
    """``o_SBND`` of all keys, of P parts; some may have none for a query, but not all. In their type."""
    return (o_PSBND * lse_PSBN.softmax(0).unsqueeze(-1)).sum(0)


def document_spans(q_SBND: Tensor, documents: Documents | None) -> Iterator[tuple[slice, range]]:
    """The samples of each document, all if there are none, and its places in them."""
    length, num_samples, *_ = q_SBND.shape
    if documents is None:
        yield slice(0, num_samples), range(length)
        return
    for start, stop in pairwise(documents.bounds):
        sample = start // length
        yield slice(sample, sample + 1), range(start - sample * length, stop - sample * length)


def square(samples: slice, places: range) -> Block:
    """Tokens among themselves."""
    held = slice(places.start, places.stop)
    return Block(samples, held, held, Meeting(is_causal=True, queries=(places,), keys=(places,)))


def attention_in_blocks(
    q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, kernel: MeetingKernel, blocks: Sequence[Block]
) -> Tensor:
    """``o_SBND`` of whole samples. ``blocks`` have every pair that attention needs once."""
    return apply(_InBlocks, q_SBND, k_SBKD, v_SBKD, kernel, blocks)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: MeetingKernel, blocks: Sequence[Block]) -> Tensor:
        ctx.blocks, ctx.kernel = blocks, kernel
        o, lse = empty_sum(q)
        for block in blocks:
            rows, keys = (block.queries, block.samples), (block.keys, block.samples)
            merge_((o[rows], lse[rows]), kernel.attend(q[rows], k[keys], v[keys], block.meeting))
        ctx.save_for_backward(q, k, v, out := o.to(q.dtype), lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
        for block in ctx.blocks:
            rows, keys = (block.queries, block.samples), (block.keys, block.samples)
            sums = tuple(grad[place] for grad, place in zip(grads, (rows, keys, keys), strict=True))
            ctx.kernel.add_gradients_(sums, grad_o[rows], q[rows], k[keys], v[keys], o[rows], lse[rows], block.meeting)
        return *(grad.to(q.dtype) for grad in grads), None, None
