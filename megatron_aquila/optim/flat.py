"""A flat buffer whose memory comes and goes."""

import torch
from torch import Tensor


class Flat:
    """A 1-D ``tensor`` of zeros. Its views, such as parameters, stay what they are while its memory is away.

    Nothing may read it or a view of it then. On CUDA memory goes back to the stream it was taken on: whoever lets go
    has made that stream wait for other streams' work on it.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)

    @property
    def is_there(self) -> bool:
        """Whether it has memory."""
        return self.tensor.untyped_storage().nbytes() > 0

    def take(self) -> Tensor:
        """The tensor with memory; what is in it is undefined if it had none."""
        if not self.is_there:
            self.tensor.untyped_storage().resize_(self.tensor.numel() * self.tensor.element_size())
        return self.tensor

    def let_go(self) -> None:
        """Give the memory back."""
        self.tensor.untyped_storage().resize_(0)
