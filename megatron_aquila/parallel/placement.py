"""Where the layers of a stage live, and in what type: what all of them have in common."""

from dataclasses import dataclass, field

import torch
from torch import nn

from megatron_aquila.kernels.products import NATIVE, Products
from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.weight_grads import WeightGradQueue
from megatron_aquila.parallel.weight_reads import WeightReads


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How layers are split and stored. One for all layers of a rank, so that they share ``weight_grads`` and
    ``weight_reads``.

    ``sequence_parallel``: between the parallel layers, activations are split along the sequence over ``tp``.
    ``overlap``: collectives run beside products that do not need them. It changes no bit.
    ``products``: how the linears multiply. ``has_memory``: whether weights have any from the start; else whoever shards
    them is to give it.
    """

    tp: Group
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    overlap: bool = False
    products: Products = NATIVE
    has_memory: bool = True
    weight_grads: WeightGradQueue = field(default_factory=WeightGradQueue)
    weight_reads: WeightReads = field(default_factory=WeightReads)

    def weight(self, *shape: int) -> nn.Parameter:
        """A parameter of this type on this device, for the initialisation or a checkpoint to fill."""
        weight = nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))
        if not self.has_memory:
            weight.untyped_storage().resize_(0)
        return weight
