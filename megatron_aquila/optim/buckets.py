"""Flat buffers behind the parameters: one collective moves a whole bucket, in place."""

from functools import partial

import torch
from torch import Tensor

from megatron_aquila.optim.groups import BucketLayout, Piece, main_dtype
from megatron_aquila.parallel.collectives import all_gather_flat_, reduce_scatter_flat_
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.params import ParamInfo


class Bucket:
    """The weights and gradient sums of a layout, and this rank's shard of both.

    The parameters become views of ``weights``. Each gradient that backward produces is added to ``grads`` at once, in
    ``main_dtype``, and dropped, so that 16-bit gradients of many microbatches are summed in float32.
    ``master`` is this rank's shard in ``main_dtype``: a copy for 16-bit weights, else the weights' own shard.
    """

    def __init__(self, layout: BucketLayout, group: Group) -> None:
        device = layout.slots[0].info.param.device
        self.layout = layout
        self._group = group
        self.weights = torch.zeros(layout.size, dtype=layout.dtype, device=device)
        self.grads = torch.zeros(layout.size, dtype=main_dtype(layout.dtype), device=device)
        self.grad_of: list[tuple[ParamInfo, Tensor]] = []
        for slot in layout.slots:
            self._adopt(slot.info, slice(slot.offset, slot.offset + slot.info.param.numel()))
        own = slice(group.rank * layout.shard_size, (group.rank + 1) * layout.shard_size)
        self.weight_shard, self.grad_shard = self.weights[own], self.grads[own]
        self.master = self.weight_shard.to(self.grads.dtype)  # no copy if the type is the same
        self.pieces: list[Piece] = layout.pieces(group.rank)

    @property
    def keeps_master(self) -> bool:
        """Whether ``master`` is a tensor of its own."""
        return self.master.dtype is not self.weights.dtype

    def _adopt(self, info: ParamInfo, where: slice) -> None:
        weight, grad = (flat[where].view(info.param.shape) for flat in (self.weights, self.grads))
        weight.copy_(info.param.detach())
        info.param.data = weight
        hook = partial(_accumulate, grad)
        info.param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types for it
        self.grad_of.append((info, grad))

    def reduce_(self) -> None:
        """Sum the gradients over the replicas into ``grad_shard``. Communicates: one reduce-scatter, in place."""
        reduce_scatter_flat_(self.grad_shard, self.grads, self._group)

    def publish_(self) -> None:
        """Give this rank's updated shard to every replica. Communicates: one all-gather, in place."""
        self.weight_shard.copy_(self.master)
        all_gather_flat_(self.weights, self.weight_shard, self._group)


def _accumulate(total: Tensor, param: Tensor) -> None:
    if param.grad is None:  # a backward that left this gradient out, to come here again with it
        return
    total.add_(param.grad)
    param.grad = None
