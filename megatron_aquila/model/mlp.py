"""The gated MLP: SwiGLU between a column-parallel and a row-parallel linear."""

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_aquila.kernels.ops import Kernels
from megatron_aquila.model.recompute import feed
from megatron_aquila.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_aquila.parallel.params import Normal, ParamInfo, column_part, row_part
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.recompute import NO_MODULES, Module
from megatron_aquila.plan.shape import ModelShape


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one weight whose local rows are [gate; up] of this tp rank."""

    def __init__(self, shape: ModelShape, *, placement: Placement, kernels: Kernels) -> None:
        super().__init__()
        self.shape, self.tp, self.kernels = shape, placement.tp, kernels
        self.gate_up = ColumnParallelLinear(
            shape.hidden_size,
            2 * shape.ffn_size,
            placement=placement,
        )
        self.down = RowParallelLinear(shape.ffn_size, shape.hidden_size, placement=placement)

    def forward(self, normed: Tensor, modules: frozenset[Module] = NO_MODULES) -> Tensor:
        """x_StBH | x_SBH, normed -> the same. Communicates only inside its two linears.

        The outputs of ``modules`` are not kept for backward.
        """
        return feed(self.kernels.swiglu, self.down, self.gate_up(normed), recompute="swiglu" in modules)

    def product(self, normed: Tensor) -> Tensor:
        """x_StBH | x_SBH, normed -> what ``down`` takes, SBFt. Communicates only in ``gate_up``."""
        return self.kernels.swiglu(self.gate_up(normed))

    def param_infos(self, prefix: str, *, stage: int, std: float, out_std: float) -> Iterator[ParamInfo]:
        """Rows of the parameter table: the fused weight with parts gate and up, and the down projection."""
        hidden, ffn = self.shape.hidden_size, self.shape.ffn_size
        yield ParamInfo(
            param=self.gate_up.weight,
            stage=stage,
            weight_decay=True,
            init=Normal(std),
            parts=(
                column_part(f"{prefix}.gate_proj.weight", (ffn, hidden), self.tp),
                column_part(f"{prefix}.up_proj.weight", (ffn, hidden), self.tp, local_row=ffn // self.tp.size),
            ),
        )
        yield ParamInfo(
            param=self.down.weight,
            stage=stage,
            weight_decay=True,
            init=Normal(out_std),
            parts=(row_part(f"{prefix}.down_proj.weight", (hidden, ffn), self.tp),),
        )
