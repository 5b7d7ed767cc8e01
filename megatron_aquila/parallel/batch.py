"""One microbatch, on the host as it was read or on the device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_aquila.kernels.documents import Documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a pipeline stage may need of one microbatch. Every rank holds all of it.

    tokens_BS, labels_BS: int64. loss_mask_BS: float32, 0 where the label does not count. positions_BS: int64, rope
    positions. source_B: int64, which entry of the blend each sample came from. documents: what attention keeps
    apart, if anything. microbatch: its number among those of this rank's step. loss_weight: what a counted token's loss
    is multiplied with in what is differentiated; None where that is not known before backward.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    positions_BS: Tensor
    source_B: Tensor
    documents: Documents | None = None
    microbatch: int = 0
    loss_weight: float | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``. From pinned memory to a GPU its tensors are on their way on return: no host waits."""
        documents = self.documents
        if documents is not None:
            documents = replace(documents, bounds_device=documents.bounds_device.to(device, non_blocking=True))
        return replace(
            self,
            tokens_BS=self.tokens_BS.to(device, non_blocking=True),
            labels_BS=self.labels_BS.to(device, non_blocking=True),
            loss_mask_BS=self.loss_mask_BS.to(device, non_blocking=True),
            positions_BS=self.positions_BS.to(device, non_blocking=True),
            source_B=self.source_B.to(device, non_blocking=True),
            documents=documents,
        )
