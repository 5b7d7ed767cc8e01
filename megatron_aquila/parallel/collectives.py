"""The one door to ``torch.distributed``'s collectives, and those that autograd differentiates, each with its adjoint.

Every function is the identity in a group of one. A collective must be called by all ranks of the group, in the same
order, with the same shape and dtype. Nothing outside this file knows that torch 2.13 renamed two of them.

A ``begin_`` function returns what is to be waited for: with ``overlap`` a collective under way, without it one that is
done. It is the same collective, so the bits are the same.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aquila.kernels.precision import apply
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.staging import Transfer, staged
from megatron_aquila.parallel.trail import Tracked, Waitable, tracked

# torch 2.13 deprecates the second names, torch 2.11 lacks the first.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A collective that was begun. What it reads and fills is not to be read, changed or freed before ``wait``."""

    def __init__(
        self,
        result: Tensor,
        work: Waitable | None = None,
        *,
        operand: Tensor | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """``work`` is None where nothing is under way. ``operand`` is kept alive; ``finish`` is what is left to do."""
        self._result, self._work, self._operand, self._finish = result, work, operand, finish

    def wait(self) -> Tensor:
        """The result, complete; further calls give it again. On CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        if self._finish is not None:
            self._finish()
        self._work = self._operand = self._finish = None
        return self._result


def all_reduce_(x: Tensor, group: Group, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Replace ``x`` by its sum, maximum or minimum over the group, and return it. ``x`` must be contiguous."""
    if group.size > 1:
        _launch("all_reduce", x, x, group, lambda x, _: dist.all_reduce(x, op=_REDUCTIONS[op], group=group.handle))
    return x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """The ranks' ``x`` joined along dim 0, in rank order."""
    return begin_all_gather(x, group, overlap=False).wait()


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's equal slice along dim 0 of the sum of the ranks' ``x``."""
    return begin_reduce_scatter(x, group, overlap=False).wait()


def begin_all_reduce_(x: Tensor, group: Group, *, overlap: bool) -> Pending:
    """Begin to replace ``x`` by its sum over the group. ``x`` must be contiguous."""
    if group.size == 1:
        return Pending(x)

    def begin(x: Tensor, _: Tensor) -> Waitable | None:
        work: Waitable | None = dist.all_reduce(x, group=group.handle, async_op=overlap)
        return work

    return Pending(x, _launch("all_reduce", x, x, group, begin, overlap=overlap))


def begin_all_gather(x: Tensor, group: Group, *, overlap: bool) -> Pending:
    """Begin to join the ranks' ``x`` along dim 0, in rank order."""
    if group.size == 1:
        return Pending(x)
    gathered, x = x.new_empty((group.size * x.shape[0], *x.shape[1:])), x.contiguous()
    begin = partial(_all_gather_single, group=group.handle, async_op=overlap)
    return Pending(gathered, _launch("all_gather", gathered, x, group, begin, overlap=overlap), operand=x)


def begin_reduce_scatter(x: Tensor, group: Group, *, overlap: bool) -> Pending:
    """Begin to sum the ranks' ``x``, for this rank's equal slice of it along dim 0."""
    if group.size == 1:
        return Pending(x)
    rows, rest = divmod(x.shape[0], group.size)
    assert rest == 0, f"shape {tuple(x.shape)} does not split over the {group.size} ranks of {group.name}"
    out, x = x.new_empty((rows, *x.shape[1:])), x.contiguous()
    begin = partial(_reduce_scatter_single, group=group.handle, async_op=overlap)
    return Pending(out, _launch("reduce_scatter", out, x, group, begin, overlap=overlap), operand=x)


def begin_all_gather_flat_(out: Tensor, shard: Tensor, group: Group, *, overlap: bool) -> Pending:
    """Begin to fill the 1-D ``out`` with the ranks' ``shard``, in rank order, which may be this rank's piece of it."""
    _check_shards(out, shard, group)
    if group.size > 1:
        begin = partial(_all_gather_single, group=group.handle, async_op=overlap)
        return Pending(out, _launch("all_gather", out, shard, group, begin, overlap=overlap), operand=shard)
    if out.data_ptr() != shard.data_ptr():
        out.copy_(shard)
    return Pending(out)


def begin_reduce_scatter_flat_(
    shard_out: Tensor,
    full: Tensor,
    group: Group,
    *,
    overlap: bool,
    dtype: torch.dtype | None = None,
    in_rank_order: bool = False,
    num_copies: int = 1,
) -> Pending:
    """Begin to fill ``shard_out`` with this rank's piece of the sum of the ranks' 1-D ``full``; they may share memory.

    ``dtype``: what travels, and is summed, is rounded to this type; a copy of ``full`` in it is held until then.
    ``in_rank_order``: what the ranks hold travels by an all-to-all and is added here, rank 0's first, in ``full``'s own
    type, so that the sum of an element does not depend on where in ``full`` it lies; a second buffer of the size of
    ``full`` is held until then. The default leaves the order to the backend, which may go by place.
    ``num_copies``, in rank order: the group is so many runs of ranks, ``full`` a shard for each rank of a run, and the
    n-th run gets the n-th piece of each shard. That takes a third buffer.
    """
    _check_shards(full, shard_out, group)
    if group.size == 1:
        if shard_out.data_ptr() != full.data_ptr():
            shard_out.copy_(full)
        return Pending(shard_out)
    sent = full if dtype is None else full.to(dtype)
    if in_rank_order:
        if num_copies > 1:
            sent = sent.view(-1, num_copies, shard_out.numel()).transpose(0, 1).reshape(-1)
        received = torch.empty_like(sent)
        begin = partial(dist.all_to_all_single, group=group.handle, async_op=overlap)
        work = _launch("all_to_all", received, sent, group, begin, overlap=overlap)
        terms = received.view(group.size, -1)
        return Pending(shard_out, work, operand=sent, finish=lambda: _sum_in_order(shard_out, terms))
    out = shard_out if sent is full else sent.new_empty(shard_out.shape)
    begin = partial(_reduce_scatter_single, group=group.handle, async_op=overlap)
    work = _launch("reduce_scatter", out, sent, group, begin, overlap=overlap)
    return Pending(shard_out, work, operand=sent, finish=None if out is shard_out else lambda: _copy(shard_out, out))


def begin_pass_on(x: Tensor, group: Group, *, overlap: bool) -> Pending:
    """Begin to send ``x`` to the next rank of the group, and to receive the one before's: a turn of the ring."""
    if group.size == 1:
        return Pending(x)
    received, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    after, before = (group.ranks[(group.rank + step) % group.size] for step in (1, -1))

    def begin(received: Tensor, x: Tensor) -> Waitable:
        turn = ((dist.isend, x, after), (dist.irecv, received, before))
        if dist.get_backend(group.handle) == "nccl":  # one after the other, each would wait until its peer came to it
            return _All(dist.batch_isend_irecv([dist.P2POp(start, y, peer, group.handle) for start, y, peer in turn]))
        works = [start(y, peer, group=group.handle) for start, y, peer in turn]
        return _All([work for work in works if work is not None])

    turning = Pending(received, _launch("pass_on", received, x, group, begin, overlap=True), operand=x)
    if not overlap:
        turning.wait()
    return turning


class _All:
    """Transfers that are awaited together."""

    def __init__(self, works: Sequence[Waitable]) -> None:
        self._works = works

    def wait(self) -> None:
        """Until each is done."""
        for work in self._works:
            work.wait()


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """The r-th equal slice along dim 0 goes to rank r; what came takes its place, in rank order."""
    if group.size == 1:
        return x
    assert x.shape[0] % group.size == 0, f"shape {tuple(x.shape)} does not split over {group.size} ranks"
    received, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    _launch("all_to_all", received, x, group, partial(dist.all_to_all_single, group=group.handle))
    return received


def _launch(op: str, out: Tensor, x: Tensor, group: Group, begin: Transfer, *, overlap: bool = False) -> Tracked | None:
    """Begin a collective of ``x`` and leave its crumb: what is to be waited for, or None where ``out`` is filled."""
    return tracked(group.trail, op, x, lambda: staged(begin, group)(out, x), waits=not overlap)


def _sum_in_order(out: Tensor, terms: Tensor) -> None:
    out.copy_(terms[0])
    for term in terms[1:]:
        out.add_(term)


def _copy(out: Tensor, value: Tensor) -> None:
    out.copy_(value)


def _check_shards(full: Tensor, shard: Tensor, group: Group) -> None:
    assert full.numel() == shard.numel() * group.size, f"{group.size} shards of {shard.numel()} are not {full.numel()}"


def gather_objects(obj: Any, group: Group) -> list[Any]:
    """Every rank's ``obj``, by rank, on every rank. For small values that JSON can carry; two all-gathers."""
    text = json.dumps(obj).encode()
    if group.size == 1:
        return [json.loads(text)]
    device = _device(group)
    sizes = all_gather(torch.tensor([len(text)], device=device), group).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_gather(padded, group).view(group.size, -1).cpu()
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    if group.size > 1:
        all_reduce_(torch.zeros(1, device=_device(group)), group).item()


def _device(group: Group) -> torch.device:
    """Where the group's backend can read tensors that the caller has no opinion on."""
    assert group.handle is not None, f"group {group.name} of {group.size} has no process group"
    return torch.device("cuda" if dist.get_backend(group.handle) == "nccl" else "cpu")


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Group) -> Tensor:
        ctx.tp = tp
        return reduce_scatter(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.tp), None


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Partial sums become one replicated tensor. Forward: all-reduce. Backward: identity."""
    return apply(_ReduceFrom, x, group) if group.size > 1 else x


def scatter_sequence(x_SBH: Tensor, tp: Group) -> Tensor:
    """Partial sums become each rank's tokens. Forward: reduce-scatter, S -> St. Backward: all-gather, St -> S."""
    return apply(_ScatterSequence, x_SBH, tp) if tp.size > 1 else x_SBH
