"""The optimizer: gradients summed, states, and as asked gradients and weights, sharded over the replicas (ZeRO)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_aquila.optim.buckets import Bucket, Reduction, Sharding, Storage
from megatron_aquila.optim.clip import Clip, counted_spans, squared_norm
from megatron_aquila.optim.gathering import Gathering
from megatron_aquila.optim.groups import plan_buckets
from megatron_aquila.optim.host import Host
from megatron_aquila.optim.rules import Rule
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import FlatRange, ParamInfo
from megatron_aquila.parallel.weight_grads import MainGrad
from megatron_aquila.plan.offload import on_host


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """What share of a rank's shards has its masters and states on the host, and the ``rule`` that updates there."""

    share: float
    rule: Rule


class DistributedOptimizer:
    """Owns the parameters of ``infos`` and updates them by ``rule``; every rank of ``ctx.shards`` updates its shard.

    A step is ``begin_step``, backward of every microbatch, ``reduce_gradients``, ``clip``, ``step``; none of them waits
    for the device. Gradients are summed over replicas, not averaged: the loss was divided by the token count of the
    whole step. A parameter that backward did not reach has the gradient 0.

    ``infos`` are in forward order. Each bucket costs one reduce-scatter and one all-gather a step. With
    ``reduction.overlap`` the reduce-scatter is begun within the backward that completes the bucket, and the all-gather
    is awaited where weights are read next: whoever reads them calls ``wait_for_weights`` first. Reductions are begun in
    the one order of the buckets, whatever order backward completes them in, so that all replicas agree on it.

    With ``sharding.gradients`` (ZeRO-2) a bucket is reduced once a microbatch, when all of its parameters have got
    theirs, and has memory only until then. With ``sharding.weights`` (ZeRO-3) a bucket is gathered before it is read
    and let go of after that. Both leave the buckets of vectors as they are: norms are small, and read everywhere.

    Where ``ctx.shards`` is not all replicas, gradients are reduced within it, whatever the level, and the sums of a
    shard joined over ``ctx.copies`` once a step: with overlap when the next bucket is begun to be reduced. The ranks of
    ``ctx.copies`` then make the same update.

    With ``offload`` some buckets are updated on the host, while the device updates the others: their gradients are
    copied there as they are reduced, and the weights back. ``step`` then waits for the device, once for the norm and
    once for each of these gradients, and computes on the host before it returns.

    Bucket sizes and shard borders change nothing element by element; what differs between layouts is the order in which
    more than two replicas' gradients are summed (not with ``reduction.in_rank_order``), and in which the squares of the
    norm are.
    """

    def __init__(
        self,
        infos: Sequence[ParamInfo],
        ctx: ParallelContext,
        *,
        rule: Rule,
        bucket_bytes: int,
        reduction: Reduction = Reduction(),
        storage: Storage = Storage(),
        sharding: Sharding = Sharding(),
        offload: Offload | None = None,
    ) -> None:
        shards, copies = ctx.shards.size, ctx.copies.size
        layouts = plan_buckets(infos, bucket_bytes=bucket_bytes, num_shards=shards, num_copies=copies)
        self._ctx = ctx
        self._rule = rule
        self._offload = offload
        self._host = None if offload is None else Host(ctx.device)
        places = on_host([layout.size for layout in layouts], 0.0 if offload is None else offload.share)
        self._buckets = [
            Bucket(
                layout,
                ctx,
                reduction=reduction,
                storage=storage,
                sharding=sharding if layout.weight_decay else Sharding(),
                host=self._host if is_on_host else None,
                on_complete=self._reduce_round if layout.weight_decay and sharding.gradients else self._reduce_complete,
            )
            for layout, is_on_host in zip(layouts, places, strict=True)
        ]
        self._whole_sums = [bucket for bucket in self._buckets if not bucket.sharding.gradients]
        self._sharded_sums = [bucket for bucket in self._buckets if bucket.sharding.gradients]
        self._gathering = Gathering(
            [bucket for bucket in reversed(self._buckets) if bucket.sharding.weights], ahead=reduction.overlap
        )
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.main_grads}
        self._states = [
            {name: torch.zeros_like(bucket.update_grad, dtype=storage.moments) for name in rule.state}
            for bucket in self._buckets
        ]
        self._reduces_early, self._most_under_way = reduction.overlap, reduction.most_under_way
        self._round: Bucket | None = None  # the sharded gradients whose reduction was begun last
        self._num_begun = 0  # buckets whose reduction was begun in this step
        counting = self._buckets if ctx.copies.rank == 0 else []
        self._counted = [bucket.grad_shard[s] for bucket in counting for s in counted_spans(bucket.pieces)]
        self._applied_steps = torch.zeros((), dtype=torch.int64, device=ctx.device)

    @property
    def applied_steps(self) -> int:
        """How many updates there were; a resumed run sets it. Counted on the device: reading it waits for that."""
        return int(self._applied_steps)

    @applied_steps.setter
    def applied_steps(self, count: int) -> None:
        """As of a checkpoint."""
        self._applied_steps.fill_(count)

    def main_grads(self) -> Mapping[nn.Parameter, MainGrad]:
        """The gradient sums, for who adds to them without autograd."""
        return {param: main for bucket in self._buckets for param, main in bucket.main_grads.items()}

    def begin_step(self, num_microbatches: int) -> None:
        """Forget the gradients of the last step. Every parameter is to get one gradient a microbatch.

        One that gets more while its bucket is reduced is an error; one that gets fewer is waited for until
        ``reduce_gradients``.
        """
        if self._host is not None:
            self._host.settle(self._ctx.device)
        for bucket in self._buckets:
            bucket.begin_step(num_microbatches)

    def reduce_gradients(self) -> None:
        """Complete the gradients: this rank's shard of every bucket holds the sum over all ranks that contributed.

        Communicates: one all-reduce over tp for the parameters whose gradients are partial sums there, one
        reduce-scatter over the replicas a bucket, or over a group of them and an all-reduce over the shard's copies, as
        far as backward has not begun it. The rest of a bucket that is not sharded is left undefined.
        """
        self._sum_over_tp()
        while self._num_begun < len(self._whole_sums):
            self._begin_reduce()
        for bucket in self._whole_sums[-1:]:
            bucket.begin_join()
        for bucket in self._sharded_sums:
            bucket.bring_in_rest()
        for bucket in (*self._whole_sums, *self._sharded_sums):
            bucket.finish_reduce()
            bucket.begin_fetch()
        self._num_begun = 0

    def clip(self, max_norm: float, *, loss_scale: float = 1.0) -> Clip:
        """How ``step`` is to use the reduced gradients: divided by ``loss_scale``, clipped to ``max_norm`` (0: not).

        Their norm is the whole model's, each logical parameter counted once: by the first group of shards alone. They
        themselves are left as they are.
        Communicates: one all-reduce of a float64 over all ranks.
        """
        squares = all_reduce_(squared_norm(self._counted, self._ctx.device), self._ctx.world)
        return Clip.at(squares.sqrt(), max_norm, loss_scale=loss_scale)

    def step(self, lr: float, clip: Clip) -> None:
        """Update this rank's shards and share the new weights, those that forward reads first before the others.

        Gradients that do not apply change nothing: no weight, no state, not the count; the weights are shared all the
        same. Communicates: one all-gather a bucket, under way on return where collectives overlap.
        """
        self.settle()
        self._applied_steps += clip.applies
        question = None if self._host is None else self._host.ask(clip, self._applied_steps)
        here = [place for place, bucket in enumerate(self._buckets) if bucket.host is None]
        for place in reversed(here):
            self._update(place, self._rule, lr, clip, self._applied_steps)
        if question is None or self._offload is None:
            return
        clip, step = question.wait()
        for place in (place for place in range(len(self._buckets)) if place not in here):
            self._buckets[place].await_fetch()
            self._update(place, self._offload.rule, lr, clip, step)

    def _update(self, place: int, rule: Rule, lr: float, clip: Clip, step: Tensor) -> None:
        """Update one bucket where its states are, and begin to share its weights."""
        bucket = self._buckets[place]
        rule.update_(
            bucket.master,
            bucket.update_grad,
            self._states[place],
            lr=lr,
            decays=bucket.layout.weight_decay,
            step=step,
            clip=clip,
            publish=bucket.publish,
            remainder=bucket.remainder,
        )
        bucket.begin_publish()

    def wait_for_weights(self, params: Iterable[nn.Parameter]) -> None:
        """Wait until ``params`` are this step's on every replica. Local; nothing where they already are.

        Sharded ones are gathered, and stay until others are read. Of those that are not trained there is only the one
        value.
        """
        for bucket in [self._bucket_of[param] for param in params if param in self._bucket_of]:
            if bucket.sharding.weights:
                self._gathering.read(bucket)
            bucket.finish_publish()

    def settle(self) -> None:
        """Wait for what is under way; keep of sharded weights the shards alone. Local."""
        self._gathering.let_go()
        for bucket in self._buckets:
            bucket.finish_publish()

    def kept_weights(self) -> list[tuple[FlatRange, Tensor]]:
        """The weights that this rank keeps, as flat views: of sharded ones its shard, of the others all.

        Who fills them calls ``refresh_masters`` after that. Waits for what is under way.
        """
        self.settle()
        kept = list[tuple[FlatRange, Tensor]]()
        for bucket in self._buckets:
            if bucket.sharding.weights:
                kept += [(piece.flat, bucket.weight_shard[piece.start : piece.stop]) for piece in bucket.pieces]
                continue
            for slot in bucket.layout.slots:
                flat = FlatRange(slot.info, 0, slot.info.param.numel())
                kept.append((flat, bucket.weights[slot.offset : slot.offset + flat.stop]))
        return kept

    def ranges(self) -> list[tuple[str, FlatRange, Tensor]]:
        """This rank's share of everything, as ``(kind, range of a parameter, view)``; ``ctx.shards`` has each once.

        Kinds: "grad", "weight", the rule's own ("exp_avg", "exp_avg_sq"), and where weights are narrower than their
        masters "master", or "remainder" for what the weights lack of it. Views are of the optimizer's memory: reading
        into them restores it. Waits for the weights.
        """
        for bucket in self._buckets:
            bucket.finish_publish()
        shares = []
        for bucket, state in zip(self._buckets, self._states, strict=True):
            kinds = {"grad": bucket.grad_shard, "weight": bucket.weight_shard, **state}
            if bucket.keeps_master:
                kinds["master"] = bucket.master
            if bucket.remainder is not None:
                kinds["remainder"] = bucket.remainder
            for piece in bucket.pieces:
                shares += [(kind, piece.flat, flat[piece.start : piece.stop]) for kind, flat in kinds.items()]
        return shares

    def not_masters(self) -> list[str]:
        """Names of the tensors in this rank's shards whose published weights are not their masters, rounded.

        Local; waits for the weights and, once, for the device. What has no master of its own is not looked at.
        """
        for bucket in self._buckets:
            bucket.finish_publish()
        kept = [bucket for bucket in self._buckets if bucket.keeps_master]
        shards = [bucket.weight_shard.to(bucket.master.device) for bucket in kept]
        wrong = [bucket.master.to(shard.dtype).ne(shard) for bucket, shard in zip(kept, shards, strict=True)]
        if not wrong or not bool(torch.stack([one.any().to(self._ctx.device) for one in wrong]).any()):
            return []
        return [
            piece.flat.info.name
            for bucket, one in zip(kept, wrong, strict=True)
            for piece in bucket.pieces
            if bool(one[piece.start : piece.stop].any())
        ]

    def refresh_masters(self) -> None:
        """Take ``kept_weights`` as they are now for the masters: after they were loaded or initialised from outside."""
        self.settle()
        for bucket in self._buckets:
            bucket.take_weights()

    def gather_shards(self) -> None:
        """Make the weights that are kept whole so again, from shards filled from outside as ``ranges`` has them.

        Communicates: an all-gather of each of their buckets. ``refresh_masters`` comes next.
        """
        self._gathering.let_go()
        for bucket in self._buckets:
            if not bucket.sharding.weights:
                bucket.begin_gather()
            bucket.finish_publish()

    def _reduce_round(self, bucket: Bucket) -> None:
        """Reduce a round of sharded gradients; the one before it, if still under way, is brought in first."""
        if self._round is not None:
            self._round.bring_in()
        self._round = bucket
        bucket.begin_reduce()
        if not self._reduces_early:
            bucket.bring_in()

    def _reduce_complete(self, _bucket: Bucket) -> None:
        """Begin to reduce what is complete, as far as nothing before it is missing."""
        if not self._reduces_early:
            return
        for bucket in self._whole_sums[self._num_begun :]:
            if not bucket.is_complete or bucket.layout.sums_over_tp:
                return
            self._begin_reduce()

    def _begin_reduce(self) -> None:
        """Begin to reduce the next bucket, once no more copies of buckets are held than may be."""
        if self._most_under_way is not None and self._num_begun >= self._most_under_way:
            self._whole_sums[self._num_begun - self._most_under_way].await_reduce()
        self._whole_sums[self._num_begun].begin_reduce()
        for bucket in self._whole_sums[: self._num_begun][-1:]:
            bucket.begin_join()  # by then it has its own group's sum
        self._num_begun += 1

    def _sum_over_tp(self) -> None:
        """One all-reduce a dtype. What it carries, and in which order, is the same for all bucket sizes."""
        partial: dict[torch.dtype, list[Tensor]] = {}
        for bucket in self._buckets:
            if bucket.layout.sums_over_tp:
                partial.setdefault(bucket.grads.dtype, []).extend(main.total for main in bucket.main_grads.values())
        for grads in partial.values():
            total = all_reduce_(torch.cat([grad.flatten() for grad in grads]), self._ctx.tp)
            for grad, part in zip(grads, torch.split(total, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
