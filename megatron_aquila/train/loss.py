"""The loss of a step: what is differentiated, and what is reported, summed by source of the blend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import ParallelContext


@dataclass(frozen=True, slots=True)
class LossMeans:
    """Mean loss in nats over all counted tokens, and over those of each source that had any.

    ``z_loss``: the mean of what the max-z loss added to it where it was differentiated, if the model has one.
    """

    loss: float
    by_source: Mapping[str, float]
    z_loss: float | None = None

    @property
    def differentiated(self) -> float:
        """The mean of everything that was differentiated."""
        return self.loss + (0.0 if self.z_loss is None else self.z_loss)


class LossSums:
    """Turns per-token losses into the scalar to differentiate and keeps the sums for the report on the device.

    ``num_tokens`` is the number of counted labels in the whole global batch, over all ranks and microbatches.
    ``loss_scale`` multiplies what is differentiated, never what is reported. All that backward reads of either is a
    tensor on the device: a step that is recorded, and replayed as another one, reads the other one's.
    """

    def __init__(
        self,
        source_names: Sequence[str],
        *,
        num_tokens: int,
        device: torch.device,
        loss_scale: float = 1.0,
        has_z_loss: bool = False,
    ) -> None:
        assert num_tokens > 0, "a global batch without a single counted label has no loss"
        self.source_names, self.num_tokens = tuple(source_names), num_tokens
        self._weight = torch.full((), loss_scale / num_tokens, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2 + has_z_loss, len(source_names), dtype=torch.float64, device=device)

    def weigh(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, with what a counted token's loss is multiplied with in the scaled global mean."""
        return [replace(batch, loss_weight=self._weight) for batch in batches]

    def restart_(self) -> None:
        """Forget the microbatches so far. Local."""
        self._sums.zero_()

    def weigh_as_(self, other: "LossSums") -> None:
        """From here on multiply with what ``other`` does. Local."""
        self._weight.copy_(other._weight)

    def take_(self, other: "LossSums") -> None:
        """Take the sums of ``other`` for the own, which were of the same microbatches. Local."""
        self._sums.copy_(other._sums)

    def loss(self, loss_SB: Tensor, batch: Batch) -> Tensor:
        """loss_SB, or (2, S, B) with the max-z loss -> this weighed microbatch's share of the scaled global mean of all
        that is in it, a scalar. Local.
        """
        assert batch.loss_weight is not None, "the batch was not weighed"
        mask_SB = batch.loss_mask_BS.t().to(loss_SB.dtype)
        masked = loss_SB * mask_SB
        assert masked.dim() == len(self._sums), f"a loss of shape {tuple(masked.shape)} for {len(self._sums)} sums"
        with torch.no_grad():
            loss_B, *z_loss_B = masked.sum(-2).view(-1, mask_SB.shape[1])
            by_sample = torch.stack([loss_B, mask_SB.sum(0), *z_loss_B]).to(torch.float64)
            self._sums.index_add_(1, batch.source_B, by_sample)
        return (masked * batch.loss_weight).sum()

    def means(self, ctx: ParallelContext) -> LossMeans:
        """Means over the global batch, equal on every rank. Waits for the device. One all-reduce over the world."""
        return self.means_of(self.total(ctx).tolist())

    def total(self, ctx: ParallelContext) -> Tensor:
        """What ``means_of`` takes, as a float64 vector on the device. One all-reduce over the world; waits for nothing.

        The last pipeline stage has the sums; its tp ranks hold equal ones, of which the first's count.
        """
        counts_here = ctx.tp.rank == 0
        return all_reduce_(self._sums * counts_here, ctx.world).flatten()

    def loss_sum(self, total: Tensor) -> Tensor:
        """The sum of all counted tokens' losses, of the values of ``total``: 0-dim, on the device. Local."""
        return total[: len(self.source_names)].sum()

    def means_of(self, total: Sequence[float]) -> LossMeans:
        """The means, from the values of ``total``. Local."""
        size = len(self.source_names)
        loss_sums, counts, z_loss_sums = total[:size], total[size : 2 * size], total[2 * size :]
        by_source = {
            name: total / count
            for name, total, count in zip(self.source_names, loss_sums, counts, strict=True)
            if count > 0
        }
        return LossMeans(
            loss=sum(loss_sums) / self.num_tokens,
            by_source=by_source,
            z_loss=sum(z_loss_sums) / self.num_tokens if z_loss_sums else None,
        )
