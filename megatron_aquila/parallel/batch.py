"""One microbatch, on the host as it was read or on the device."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.documents import Documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a pipeline stage may need of one microbatch: all of it, or S tokens of every sample where cp splits them.

    tokens_BS, labels_BS: int64. loss_mask_BS: float32, 0 where the label does not count. positions_BS: int64, rope
    positions. source_B: int64, which entry of the blend each sample came from. documents: what attention keeps apart in
    the whole samples, if anything. microbatch: its number among those of this rank's step. loss_weight: what a counted
    token's loss is multiplied with in what is differentiated, 0-dim; None where that is not known before backward.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    positions_BS: Tensor
    source_B: Tensor
    documents: Documents | None = None
    microbatch: int = 0
    loss_weight: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``. From pinned memory to a GPU its tensors are on their way on return: no host waits."""
        moved: Batch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, however deep in dataclasses, sent to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
