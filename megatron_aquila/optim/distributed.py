"""The optimizer: gradients summed, states and master weights sharded over the replicas (ZeRO-1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_aquila.optim.buckets import Bucket
from megatron_aquila.optim.clip import clip_factor, counted, squared_norm
from megatron_aquila.optim.groups import plan_buckets
from megatron_aquila.optim.rules import Rule
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import FlatRange, ParamInfo


class DistributedOptimizer:
    """Owns the parameters of ``infos`` and updates them by ``rule``; every rank of ``ctx.dp_cp`` updates its shard.

    A step is ``zero_grad``, backward of every microbatch, ``reduce_gradients``, ``clip_``, ``step``. Gradients are
    summed over replicas, not averaged: the loss was divided by the token count of the whole step. A parameter that
    backward did not reach has the gradient 0. ``applied_steps`` counts updates; a resumed run sets it.

    Each bucket costs one reduce-scatter and one all-gather a step. Bucket sizes and shard borders change nothing
    element by element; what differs between layouts is the order in which more than two replicas' gradients are summed,
    and in which the squares of the norm are.
    """

    def __init__(self, infos: Sequence[ParamInfo], ctx: ParallelContext, *, rule: Rule, bucket_bytes: int) -> None:
        layouts = plan_buckets(infos, bucket_bytes=bucket_bytes, num_shards=ctx.dp_cp.size)
        self._ctx = ctx
        self._rule = rule
        self._buckets = [Bucket(layout, ctx.dp_cp) for layout in layouts]
        self._states = [{name: torch.zeros_like(bucket.master) for name in rule.state} for bucket in self._buckets]
        self.applied_steps = 0

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for bucket in self._buckets:
            bucket.grads.zero_()

    def reduce_gradients(self) -> None:
        """Complete the gradients: this rank's shard of every bucket holds the sum over all ranks that contributed.

        Communicates: one all-reduce over tp for the parameters whose gradients are partial sums there, one
        reduce-scatter over the replicas a bucket. The rest of the bucket is left undefined.
        """
        self._sum_over_tp()
        for bucket in self._buckets:
            bucket.reduce_()

    def grad_norm(self) -> float:
        """Norm of the whole model's reduced gradients, each logical parameter counted once; the same on every rank.

        Communicates: one all-reduce of a float64 over all ranks. The optimizer's only wait for the device.
        """
        grads = [
            bucket.grad_shard[piece.start + start - piece.flat.start : piece.start + stop - piece.flat.start]
            for bucket in self._buckets
            for piece in bucket.pieces
            for start, stop in counted(piece.flat)
        ]
        total = squared_norm(grads).to(self._ctx.device)
        return all_reduce_(total, self._ctx.world).sqrt().item()

    def clip_(self, max_norm: float, *, loss_scale: float = 1.0) -> float:
        """Divide the reduced gradients by ``loss_scale`` and clip them to the global norm ``max_norm``, in one pass.

        0 means no clipping. Returns the norm after the division and before the clipping. Where it is not finite the
        gradients are of no use, and the caller decides what becomes of the step. Communicates as ``grad_norm``.
        """
        norm = self.grad_norm() / loss_scale
        factor = clip_factor(norm, max_norm) / loss_scale
        if factor != 1:
            for bucket in self._buckets:
                bucket.grad_shard.mul_(factor)
        return norm

    def step(self, lr: float) -> None:
        """Update this rank's shards and share the new weights. Communicates: one all-gather a bucket."""
        self.applied_steps += 1
        for bucket, state in zip(self._buckets, self._states, strict=True):
            decays = bucket.layout.weight_decay
            self._rule.update_(bucket.master, bucket.grad_shard, state, lr=lr, decays=decays, step=self.applied_steps)
            bucket.publish_()

    def ranges(self) -> list[tuple[str, FlatRange, Tensor]]:
        """This rank's share of everything, as ``(kind, range of a parameter, flat view)``; the replicas cover it once.

        Kinds: "grad", "weight", the rule's own ("exp_avg", "exp_avg_sq"), and "master" where weights are narrower than
        their masters. Views are of the optimizer's memory: reading into them restores it.
        """
        shares = []
        for bucket, state in zip(self._buckets, self._states, strict=True):
            kinds = {"grad": bucket.grad_shard, "weight": bucket.weight_shard, **state}
            if bucket.keeps_master:
                kinds["master"] = bucket.master
            for piece in bucket.pieces:
                shares += [(kind, piece.flat, flat[piece.start : piece.stop]) for kind, flat in kinds.items()]
        return shares

    def refresh_masters(self) -> None:
        """Take the weights as they are now for the masters: after they were loaded or initialised from outside."""
        for bucket in self._buckets:
            bucket.master.copy_(bucket.weight_shard)

    def _sum_over_tp(self) -> None:
        partial: dict[torch.dtype, list[Tensor]] = {}
        for bucket in self._buckets:
            for info, grad in bucket.grad_of:
                if info.sums_over_tp:
                    partial.setdefault(grad.dtype, []).append(grad)
        for grads in partial.values():
            total = all_reduce_(torch.cat([grad.flatten() for grad in grads]), self._ctx.tp)
            for grad, part in zip(grads, torch.split(total, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
