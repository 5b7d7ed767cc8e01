"""The one door to ``torch.distributed``'s collectives, and those that autograd differentiates, each with its adjoint.

Every function is the identity in a group of one. A collective must be called by all ranks of the group, in the same
order, with the same shape and dtype. Nothing outside this file knows that torch 2.13 renamed two of them.
"""

import json
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aquila.kernels.precision import apply
from megatron_aquila.parallel.context import Group

# torch 2.13 deprecates the second names, torch 2.11 lacks the first.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def all_reduce_(x: Tensor, group: Group, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Replace ``x`` by its sum, maximum or minimum over the group, and return it. ``x`` must be contiguous."""
    if group.size > 1:
        dist.all_reduce(x, op=_REDUCTIONS[op], group=group.handle)
    return x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """The ranks' ``x`` joined along dim 0, in rank order."""
    if group.size == 1:
        return x
    gathered = x.new_empty((group.size * x.shape[0], *x.shape[1:]))
    _all_gather_single(gathered, x.contiguous(), group=group.handle)
    return gathered


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's equal slice along dim 0 of the sum of the ranks' ``x``."""
    if group.size == 1:
        return x
    rows, rest = divmod(x.shape[0], group.size)
    assert rest == 0, f"shape {tuple(x.shape)} does not split over the {group.size} ranks of {group.name}"
    out = x.new_empty((rows, *x.shape[1:]))
    _reduce_scatter_single(out, x.contiguous(), group=group.handle)
    return out


def all_gather_flat_(out: Tensor, shard: Tensor, group: Group) -> None:
    """Fill the 1-D ``out`` with the ranks' ``shard``, in rank order. ``shard`` may be this rank's piece of ``out``."""
    assert out.numel() == shard.numel() * group.size, f"{group.size} shards of {shard.numel()} are not {out.numel()}"
    if group.size > 1:
        _all_gather_single(out, shard, group=group.handle)
    elif out.data_ptr() != shard.data_ptr():
        out.copy_(shard)


def reduce_scatter_flat_(shard_out: Tensor, full: Tensor, group: Group) -> None:
    """Fill ``shard_out`` with this rank's piece of the sum of the ranks' 1-D ``full``; they may share memory."""
    assert full.numel() == shard_out.numel() * group.size, (
        f"{group.size} shards of {shard_out.numel()} are not {full.numel()}"
    )
    if group.size > 1:
        _reduce_scatter_single(shard_out, full, group=group.handle)
    elif shard_out.data_ptr() != full.data_ptr():
        shard_out.copy_(full)


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
