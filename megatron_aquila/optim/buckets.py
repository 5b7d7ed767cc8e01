"""Flat buffers behind the parameters: one collective moves a whole bucket, in place."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megatron_aquila.optim.flat import Flat
from megatron_aquila.optim.groups import BucketLayout, Piece, main_dtype
from megatron_aquila.optim.host import Fetch, Host
from megatron_aquila.parallel.collectives import (
    Pending,
    begin_all_gather_flat_,
    begin_all_reduce_,
    begin_reduce_scatter_flat_,
)
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.weight_grads import MainGrad


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How a bucket's gradients are summed over the replicas, and whether collectives run beside computation.

    ``dtype``: what they travel in, None for the type they are summed up in. ``in_rank_order``: added in the order of
    ranks, so that a sum depends on no bucket's size. ``overlap`` changes no bit.

    Where the replicas are groups that each have all shards, the sum is made in two steps: within each group, then of
    what the groups have, which travels in the type it is summed up in. In rank order the first step is over all
    replicas at once, a rank adding up a piece of its shard, and the second joins the pieces: the same sums.
    """

    dtype: torch.dtype | None = None
    in_rank_order: bool = False
    overlap: bool = False

    @property
    def most_under_way(self) -> int | None:
        """How many buckets may be reduced at once where each holds a copy of itself; None where none does."""
        has_copies = self.dtype is not None or self.in_rank_order
        return None if not has_copies else 2 if self.overlap else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How an optimizer keeps what it needs between steps.

    ``moments``: their type, None for that of the gradients' sums. ``has_remainders``: of the float32 master of a
    bfloat16 weight only the 16 bits that the weight lacks (``kernels.remainder``), else all of it.
    """

    moments: torch.dtype | None = None
    has_remainders: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """What a rank keeps only its shard of, beside the optimizer's states (Rajbhandari et al. 2020, ZeRO).

    ``gradients``: a bucket is reduced after each microbatch, and its memory let go of. ``weights``: a bucket is
    gathered before it is read, and let go of after that.
    """

    gradients: bool = False
    weights: bool = False


class Bucket:
    """The weights and gradient sums of a layout, and this rank's shard of both.

    The parameters become views of ``weights``, the sums of their gradients (``main_grads``) views of ``grads``. Each
    gradient that autograd produces is added there at once, in ``main_dtype``, and dropped, so that 16-bit gradients of
    many microbatches are summed in float32. ``master`` is this rank's shard as updates change it: a copy in
    ``main_dtype`` for 16-bit weights, else the weights' own shard, then with a ``remainder`` where ``storage`` says so.
    With a ``host`` all that an update touches is there: it reads ``update_grad`` and leaves ``new_weights``, which are
    copies of the shards; else they are the shards themselves.
    ``on_complete`` is called when the last gradient of a step has been added; where gradients are sharded, when every
    parameter has had one more, and then there is something to reduce.
    """

    def __init__(
        self,
        layout: BucketLayout,
        ctx: ParallelContext,
        *,
        reduction: Reduction = Reduction(),
        storage: Storage = Storage(),
        sharding: Sharding = Sharding(),
        host: Host | None = None,
        on_complete: Callable[["Bucket"], None] = lambda _bucket: None,
    ) -> None:
        device, own_type = layout.slots[0].info.param.device, main_dtype(layout.dtype)
        self.layout, self.sharding, self.host = layout, sharding, host
        self._ctx, self._reduction, self._on_complete = ctx, reduction, on_complete
        self._missing: int | None = None  # gradients still to come in this step, None while they are not counted
        self._reducing: Pending | None = None
        self._joining: Pending | None = None
        self._gathering: Pending | None = None
        self._fetching: Fetch | None = None
        self._weights = Flat(layout.size, layout.dtype, device)
        self._grads = Flat(layout.size, own_type, device)
        self.weights, self.grads = self._weights.tensor, self._grads.tensor
        self.main_grads: dict[nn.Parameter, MainGrad] = {}
        for slot in layout.slots:
            self._adopt(slot.info.param, slice(slot.offset, slot.offset + slot.info.param.numel()))
        own = slice(ctx.shards.rank * layout.shard_size, (ctx.shards.rank + 1) * layout.shard_size)
        self.weight_shard = self.weights[own].clone() if sharding.weights else self.weights[own]
        self.grad_shard = torch.zeros_like(self.grads[own]) if sharding.gradients else self.grads[own]
        self._summed = self.grad_shard  # what of it the first step of a sum makes
        if reduction.in_rank_order:
            self._summed = self.grad_shard.chunk(ctx.copies.size)[ctx.copies.rank]
        self.update_grad, self.new_weights = self.grad_shard, self.weight_shard
        if host is not None:
            self.update_grad, self.new_weights = host.like(self.grad_shard), host.like(self.weight_shard)
        self.remainder: Tensor | None = None
        self.master = self.new_weights
        if storage.has_remainders and layout.dtype is torch.bfloat16:
            self.remainder = torch.zeros_like(self.master, dtype=torch.int16)
        else:
            self.master = self.new_weights.to(own_type)  # no copy if the type is the same
        self.pieces: list[Piece] = layout.pieces(ctx.shards.rank)
        if sharding.gradients:
            self._grads.let_go()
        if sharding.weights:
            self._weights.let_go()

    @property
    def keeps_master(self) -> bool:
        """Whether ``master`` is a tensor of its own."""
        return self.master.dtype is not self.weights.dtype

    @property
    def publish(self) -> Tensor | None:
        """Where an update leaves the weights to be published, rounded; None where it updates the weights themselves."""
        return self.new_weights if self.keeps_master else None

    @property
    def is_complete(self) -> bool:
        """Whether every gradient of the step has been added."""
        return self._missing == 0

    def begin_step(self, num_microbatches: int) -> None:
        """Forget the gradients of the last step; each parameter is to get one a microbatch."""
        self.grad_shard.zero_() if self.sharding.gradients else self.grads.zero_()
        self._missing = num_microbatches * len(self.layout.slots)

    def begin_reduce(self) -> None:
        """Begin to sum the gradients over the replicas, or over a group of them. Communicates: one reduce-scatter."""
        how = self._reduction
        self._reducing = begin_reduce_scatter_flat_(
            torch.empty_like(self._summed) if self.sharding.gradients else self._summed,
            self.grads,
            self._ctx.dp_cp if how.in_rank_order else self._ctx.shards,
            overlap=how.overlap,
            dtype=how.dtype,
            in_rank_order=how.in_rank_order,
            num_copies=self._ctx.copies.size,
        )

    def await_reduce(self) -> None:
        """Wait for the sums and let go of copies made for it; a gradient that still came would be noticed."""
        assert self._reducing is not None, "the reduction was never begun"
        self._reducing.wait()

    def begin_join(self) -> None:
        """Begin to give each group the others' sums, once, where there are others.

        Communicates: one all-reduce of ``grad_shard``, or in rank order one all-gather of its pieces, over its copies.
        """
        if self._ctx.copies.size == 1 or self._joining is not None:
            return
        if not self.sharding.gradients:
            self.await_reduce()
        overlap = self._reduction.overlap
        if self._reduction.in_rank_order:
            self._joining = begin_all_gather_flat_(self.grad_shard, self._summed, self._ctx.copies, overlap=overlap)
        else:
            self._joining = begin_all_reduce_(self.grad_shard, self._ctx.copies, overlap=overlap)

    def finish_reduce(self) -> None:
        """Wait until ``grad_shard`` holds the sums; the rest of ``grads`` is undefined then."""
        if self._joining is not None:
            self._joining.wait()
        elif not self.sharding.gradients:
            self.await_reduce()
        self._reducing = self._joining = self._missing = None

    def bring_in(self) -> None:
        """Add what is being reduced, if anything is, to ``grad_shard``, where gradients are sharded.

        The groups' sums are joined once, when the last of a step is in.
        """
        if self._reducing is not None:
            self._summed.add_(self._reducing.wait())
            self._reducing = None
            self._grads.let_go()
            if self.is_complete:
                self.begin_join()

    def bring_in_rest(self) -> None:
        """Reduce what is left, where gradients are sharded, and begin to join. One reduce-scatter, or none.

        Something is left where a parameter got no gradient.
        """
        self.bring_in()
        if self._grads.is_there:
            self.begin_reduce()
            self.bring_in()
        self.begin_join()

    def begin_fetch(self) -> None:
        """Begin to copy the sums to the host, if the update is made there."""
        if self.host is not None:
            self._fetching = self.host.fetch(self.grad_shard, self.update_grad)

    def await_fetch(self) -> None:
        """Wait until the host has the sums. It then also has what it last sent: that was before them."""
        assert self._fetching is not None, "the sums were never fetched"
        self._fetching.wait()
        self._fetching = None

    def begin_publish(self) -> None:
        """Begin to give ``weight_shard`` to the ranks that need it. Communicates: one all-gather, in place.

        Where weights are sharded nothing is gathered before it is read: what was, is let go of. Those that were updated
        on the host are sent from there first, in the device's order of work.
        """
        if self.host is not None:
            self.weight_shard.copy_(self.new_weights, non_blocking=True)
        if self.sharding.weights:
            self.let_go()
        else:
            self.begin_gather()

    def begin_gather(self) -> None:
        """Begin to fill ``weights``, unless they are there or on their way. Communicates: one all-gather."""
        if self.sharding.weights and self._weights.is_there:
            return
        out = self._weights.take()
        self._gathering = begin_all_gather_flat_(
            out, self.weight_shard, self._ctx.shards, overlap=self._reduction.overlap
        )

    def finish_publish(self) -> None:
        """Wait until ``weights`` holds what every rank has published, if that is under way."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def let_go(self) -> None:
        """Of weights that are sharded, keep this rank's shard alone."""
        self.finish_publish()
        self._weights.let_go()

    def take_weights(self) -> None:
        """Take the master from ``weight_shard``, which was filled from outside. Local."""
        self.new_weights.copy_(self.weight_shard)
        self.master.copy_(self.new_weights)
        if self.remainder is not None:
            self.remainder.zero_()

    def _adopt(self, param: nn.Parameter, where: slice) -> None:
        weight, grad = (flat[where].view(param.shape) for flat in (self.weights, self.grads))
        if param.untyped_storage().nbytes() > 0:
            weight.copy_(param.detach())
        param.data = weight
        main = self.main_grads[param] = (
            MainGrad(grad, self._count, self._make_room) if self.sharding.gradients else MainGrad(grad, self._count)
        )
        # torch keeps hooks where Python's garbage collector does not look: a strong reference would keep all for ever
        hook = partial(_accumulate, weakref.ref(main))
        param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types for it

    def _make_room(self) -> None:
        """Before something is added to sharded gradients: what was added before is on its way, and must be gone."""
        self.bring_in()
        if not self._grads.is_there:
            self._grads.take().zero_()

    def _names(self) -> str:
        return ", ".join(slot.info.name for slot in self.layout.slots)

    def _count(self) -> None:
        """A gradient has been added."""
        if self.sharding.gradients:
            self._count_sharded()
            return
        assert self._reducing is None, f"a gradient was added to a sum that is being reduced, of one of {self._names()}"
        if self._missing is not None:
            self._missing -= 1
            if self._missing == 0:
                self._on_complete(self)

    def _count_sharded(self) -> None:
        """A round of gradients is complete with one of each parameter.

        One that went with an earlier round leaves nothing: a head adds pieces in forward, and several forwards may come
        before a backward.
        """
        assert self._missing is not None, f"a gradient came outside a step, of one of {self._names()}"
        assert self._joining is None, f"a gradient was added to a sum that is being joined, of one of {self._names()}"
        self._missing -= 1
        if self._missing % len(self.layout.slots) == 0 and self._grads.is_there and self._reducing is None:
            self._on_complete(self)


def _accumulate(reference: weakref.ref[MainGrad], param: nn.Parameter) -> None:
    """What autograd runs after each of its gradients; there is none where a linear's is owed, or added elsewhere."""
    main = reference()
    assert main is not None, "a gradient came for an optimizer that is gone"
    if param.grad is None:
        return
    main.total.add_(param.grad)
    param.grad = None
    main.added()
