"""Causal self-attention with grouped key/value heads, its heads split over tp."""

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.ops import CausalAttention, Kernels
from megatron_aquila.model.norm import RMSNorm
from megatron_aquila.model.position import attention_of, head_splitter
from megatron_aquila.model.recompute import feed
from megatron_aquila.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_aquila.parallel.params import Normal, ParamInfo, column_part, row_part
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.recompute import NO_MODULES, Module
from megatron_aquila.plan.shape import ModelShape


class Attention(nn.Module):
    """q, k and v from one fused projection whose local rows are [q heads; k heads; v heads] of this tp rank."""

    def __init__(self, shape: ModelShape, *, placement: Placement, kernels: Kernels) -> None:
        super().__init__()
        self.shape, self.tp = shape, placement.tp
        self.split, self.attend = head_splitter(shape, kernels), attention_of(shape, kernels, placement.tp)
        self.qkv = ColumnParallelLinear(
            shape.hidden_size,
            shape.attention_size + 2 * shape.kv_size,
            placement=placement,
        )
        self.out = RowParallelLinear(
            shape.attention_size,
            shape.hidden_size,
            placement=placement,
        )

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        cos_SBD: Tensor,
        sin_SBD: Tensor,
        documents: Documents | None,
        modules: frozenset[Module] = NO_MODULES,
        core: CausalAttention | None = None,
    ) -> Tensor:
        """x_StBH | x_SBH, before its ``norm`` -> the same. Communicates only inside its two linears.

        The outputs of ``modules`` are not kept for backward. ``core`` attends in place of the run's kernel: a cache.
        """
        attend = self.attend if core is None else core
        num_heads, num_kv_heads = (n // self.tp.size for n in (self.shape.num_heads, self.shape.num_kv_heads))
        qkv = feed(norm, self.qkv, x, recompute="norms" in modules)  # nobody but the rotation needs it
        q_SBNtD, k_SBKtD, v_SBKtD = self.split(qkv, cos_SBD, sin_SBD, num_heads=num_heads, num_kv_heads=num_kv_heads)

        def heads(q_SBNtD: Tensor, k_SBKtD: Tensor, v_SBKtD: Tensor) -> Tensor:
            return attend(q_SBNtD, k_SBKtD, v_SBKtD, documents).flatten(-2)

        return feed(heads, self.out, q_SBNtD, k_SBKtD, v_SBKtD, recompute="attention" in modules)

    def param_infos(self, prefix: str, *, stage: int, std: float, out_std: float) -> Iterator[ParamInfo]:
        """Rows of the parameter table: the fused weight with parts q, k, v, and the output projection."""
        hidden, q_size, kv_size = self.shape.hidden_size, self.shape.attention_size, self.shape.kv_size
        k_row = q_size // self.tp.size
        v_row = k_row + kv_size // self.tp.size
        yield ParamInfo(
            param=self.qkv.weight,
            stage=stage,
            weight_decay=True,
            init=Normal(std),
            parts=(
                column_part(f"{prefix}.q_proj.weight", (q_size, hidden), self.tp),
                column_part(f"{prefix}.k_proj.weight", (kv_size, hidden), self.tp, local_row=k_row),
                column_part(f"{prefix}.v_proj.weight", (kv_size, hidden), self.tp, local_row=v_row),
            ),
        )
        yield ParamInfo(
            param=self.out.weight,
            stage=stage,
            weight_decay=True,
            init=Normal(out_std),
            parts=(row_part(f"{prefix}.o_proj.weight", (hidden, q_size), self.tp),),
        )
