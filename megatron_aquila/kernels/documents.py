"""Where the documents of a microbatch lie, in the forms that attention kernels want."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of B samples of S tokens laid end to end: document i is the tokens ``bounds[i]`` to ``bounds[i + 1]``.

    None reaches from one sample into the next. ``bounds`` is on the host, for kernels that are called a document at a
    time; ``bounds_device`` holds the same as int32 where the tokens are, so that no layer waits for a copy.
    """

    bounds: tuple[int, ...]
    bounds_device: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    def numbers_BS(self, num_samples: int) -> Tensor:
        """The document of each token, counted over the microbatch."""
        tokens = torch.arange(self.bounds[-1], device=self.bounds_device.device)
        return torch.bucketize(tokens, self.bounds_device, right=True).view(num_samples, -1)
