"""RMSNorm as a module, alone or of a sum: the weight and its row in the parameter table."""

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_aquila.kernels.ops import Kernels
from megatron_aquila.parallel.params import Constant, ParamInfo, replicated_part
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.shape import NormOrder


class _Norm(nn.Module):
    """Local: each rank normalises the rows it holds.

    Under sequence parallel a rank sees only its shard of the rows, so the weight's gradient is a partial sum over tp.
    """

    def __init__(self, size: int, *, eps: float, order: NormOrder, kernels: Kernels, placement: Placement) -> None:
        super().__init__()
        self.eps, self.order, self.kernels, self.placement = eps, order, kernels, placement
        self.weight = placement.weight(size)

    def param_infos(self, prefix: str, *, stage: int, init: float) -> Iterator[ParamInfo]:
        """The weight's row in the parameter table: no decay, constant ``init``, replicated over tp."""
        yield ParamInfo(
            param=self.weight,
            stage=stage,
            weight_decay=False,
            init=Constant(init),
            parts=(replicated_part(f"{prefix}.weight", tuple(self.weight.shape), self.placement.tp),),
            sums_over_tp=self.placement.sequence_parallel,
        )


class RMSNorm(_Norm):
    """x / rms(x) * weight over the last dim."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H) -> (..., H), in x's dtype."""
        return self.kernels.rms_norm(x, self.weight, eps=self.eps, order=self.order)


class AddRMSNorm(_Norm):
    """A sum and its RMSNorm: where a layer's output joins the residual stream and the next layer takes its norm."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual (..., H) -> (x + residual, its norm), each (..., H), in x's dtype."""
        return self.kernels.add_rms_norm(x, residual, self.weight, eps=self.eps, order=self.order)
