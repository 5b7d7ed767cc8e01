"""One microbatch on the device."""

from dataclasses import dataclass

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
