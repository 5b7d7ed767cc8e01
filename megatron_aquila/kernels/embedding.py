"""Look-up of rows, with a gradient that is summed in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.kernels.precision import apply, compute_dtype


class _Embedding(torch.autograd.Function):
    """Saves the ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = grad.to(compute_dtype(grad.dtype))
        total = torch.ops.aten.embedding_dense_backward(
            wide, ids, ctx.num_rows, padding_idx=-1, scale_grad_by_freq=False
        )
        return None, total.to(grad.dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ``ids`` of ``weight``.

    A frequent token's gradient is a sum of thousands of rows. torch's kernels round it to the weight's type on the way
    (on a CPU after every row, on a GPU after every few), so the rows are widened first and the sum is rounded once.
    """
    return apply(_Embedding, ids, weight)
