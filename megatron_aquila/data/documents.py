"""Documents packed into one sample: where they start, and what is kept apart at their borders."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRules:
    """What a document's end means to the rest of its sample, as in Megatron-LM's ``GPTDataset``.

    A document ends with the token ``eod``, which still belongs to it; a sample may begin and end inside a document.
    ``reset_positions``: positions count from 0 again. ``reset_attention``: no token sees an earlier document.
    ``mask_loss``: the token after ``eod`` is not learnt, as nothing of its document has been seen.
    """

    eod: int
    reset_positions: bool
    reset_attention: bool
    mask_loss: bool

    def positions(self, tokens_BS: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rope positions: from the start of the sample, or of the document."""
        index = np.arange(tokens_BS.shape[1], dtype=np.int64)
        starts_BS = np.where(self._starts(tokens_BS) & self.reset_positions, index, 0)
        return index - np.maximum.accumulate(starts_BS, axis=1)

    def loss_mask(self, tokens_BS: NDArray[np.int64]) -> NDArray[np.float32]:
        """0 where the label does not count."""
        mask_BS: NDArray[np.float32] = ((tokens_BS != self.eod) | (not self.mask_loss)).astype(np.float32)
        return mask_BS

    def bounds(self, tokens_BS: NDArray[np.int64]) -> NDArray[np.int32] | None:
        """Borders of the documents when all samples are laid end to end: int32 from 0 to B * S.

        The start of a sample is one. ``None`` where attention does not mind.
        """
        if not self.reset_attention:
            return None
        return np.append(np.flatnonzero(self._starts(tokens_BS)), tokens_BS.size).astype(np.int32)

    def _starts(self, tokens_BS: NDArray[np.int64]) -> NDArray[np.bool_]:
        starts_BS = np.ones(tokens_BS.shape, dtype=np.bool_)
        starts_BS[:, 1:] = tokens_BS[:, :-1] == self.eod
        return starts_BS
