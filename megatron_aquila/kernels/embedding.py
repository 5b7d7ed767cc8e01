"""Look-up of rows, with a gradient that is summed in float32."""

import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.precision import compute_dtype, multiplies_widened


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ``ids`` of ``weight``.

    A frequent token's gradient is a sum of thousands of rows. torch's GPU kernel carries it in float32; its CPU kernel
    rounds after every row, so there the look-up runs on a widened copy and the gradient is rounded once.
    """
    if multiplies_widened(weight):
        return F.embedding(ids, weight.to(compute_dtype(weight.dtype))).to(weight.dtype)
    return F.embedding(ids, weight)
