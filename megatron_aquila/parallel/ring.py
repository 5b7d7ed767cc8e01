"""Ring attention: every rank keeps its queries, and the keys and values of all ranks come by, one shard after another.

Liu et al. 2023, with the head-tail shards of ``plan.sequence.shard_pieces``, by which causal work is even.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.attention_blocks import ScoreBlocks
from megatron_aquila.kernels.blocks import BlockAttention
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.parts import Meeting, MeetingKernel, empty_sum, merge_
from megatron_aquila.kernels.precision import apply
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.parallel.collectives import begin_pass_on
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.sequence import Block, ring_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class RingAttention:
    """A ``CausalAttention`` over sequences that are split over ``cp``. ``documents`` are those of whole samples.

    Forward: keys and values go around the ring, cp - 1 messages. Backward: they do again, and their gradients, summed
    in ``compute_dtype``, follow them home in cp messages. With ``overlap`` the next shard is under way while the
    present one is attended to; that changes no bit.
    """

    cp: Group
    kernel: BlockAttention | ScoreBlocks
    overlap: bool

    def __call__(
        self,
        q_SBND: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        documents: Documents | None = None,
        *,
        scores: Scores = Scores(),
    ) -> Tensor:
        """q_ScBND, k_ScBKD, v_ScBKD -> o_ScBND. Distances are those of the whole samples."""
        return apply(_Ring, q_SBND, k_SBKD, v_SBKD, self, self.kernel.of(scores), documents)

    def blocks(self, q_SBND: Tensor, documents: Documents | None, owner: int) -> list[Block]:
        """What this rank's queries have to do with the keys of rank ``owner``. Local."""
        return ring_blocks(
            None if documents is None else documents.bounds,
            num_samples=q_SBND.shape[1],
            seq_len=q_SBND.shape[0] * self.cp.size,
            cp=self.cp.size,
            rank=self.cp.rank,
            owner=owner,
        )

    def owner(self, step: int) -> int:
        """The rank whose keys are here after ``step`` turns."""
        return (self.cp.rank - step) % self.cp.size


class _Ring(torch.autograd.Function):
    """Keeps what ordinary attention keeps: q, k, v, the output and its log-sums, all of this rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ring: RingAttention,
        kernel: MeetingKernel,
        documents: Documents | None,
    ) -> Tensor:
        ctx.ring, ctx.kernel, ctx.documents = ring, kernel, documents
        o, lse = empty_sum(q)
        kv, last = torch.stack((k, v)), ring.cp.size - 1
        for step in range(ring.cp.size):
            turning = begin_pass_on(kv, ring.cp, overlap=ring.overlap) if step < last else None
            for block in ring.blocks(q, documents, ring.owner(step)):
                rows, keys = (block.queries, block.samples), (block.keys, block.samples)
                part = kernel.attend(q[rows], kv[0][keys], kv[1][keys], _meeting(block))
                merge_((o[rows], lse[rows]), part)
            kv = kv if turning is None else turning.wait()
        ctx.save_for_backward(q, k, v, out := o.to(q.dtype), lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        ring: RingAttention = ctx.ring
        q, k, v, o, lse = ctx.saved_tensors
        grad_q, kv, last = torch.zeros_like(q, dtype=lse.dtype), torch.stack((k, v)), ring.cp.size - 1
        returning = None
        for step in range(ring.cp.size):
            turning = begin_pass_on(kv, ring.cp, overlap=ring.overlap) if step < last else None
            grad_kv = torch.zeros_like(kv, dtype=lse.dtype)
            for block in ring.blocks(q, ctx.documents, ring.owner(step)):
                rows, keys = (block.queries, block.samples), (block.keys, block.samples)
                sums = (grad_q[rows], grad_kv[0][keys], grad_kv[1][keys])
                ctx.kernel.add_gradients_(
                    sums, grad_o[rows], q[rows], kv[0][keys], kv[1][keys], o[rows], lse[rows], _meeting(block)
                )
            if returning is not None:
                grad_kv += returning.wait()  # from the ranks that had these keys before
            returning = begin_pass_on(grad_kv, ring.cp, overlap=ring.overlap)
            kv = kv if turning is None else turning.wait()
        assert returning is not None, "a ring has at least one rank"
        grad_k, grad_v = returning.wait().to(k.dtype).unbind()
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


def _meeting(block: Block) -> Meeting:
    return Meeting(is_causal=block.is_causal, queries=block.query_places, keys=block.key_places)
