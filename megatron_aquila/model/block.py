"""One transformer block: pre-norm attention and pre-norm MLP, each added to the residual stream."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.ops import CausalAttention, Kernels
from megatron_aquila.model.attention import Attention
from megatron_aquila.model.mlp import MLP
from megatron_aquila.model.norm import AddRMSNorm, RMSNorm
from megatron_aquila.model.recompute import feed
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.recompute import NO_MODULES, Module
from megatron_aquila.plan.shape import ModelShape


def recomputed(
    blocks: Sequence["Block"], x: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, documents: Documents | None
) -> Tensor:
    """``blocks`` one after the other, x_StBH | x_SBH -> the same, of which only the input is kept for backward.

    Backward runs all of it again but the last linear, whose output no gradient needs.
    """
    *first, last = blocks

    def until_last(x: Tensor) -> tuple[Tensor, Tensor]:
        for block in first:
            x = block(x, cos_SBD, sin_SBD, documents)
        return last.until_down(x, cos_SBD, sin_SBD, documents)

    return feed(until_last, last.down, x, recompute=True)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelShape, *, placement: Placement, kernels: Kernels) -> None:
        super().__init__()
        self.shape = shape
        size, eps, order = shape.hidden_size, shape.norm_eps, shape.norm_order
        self.attention_norm = RMSNorm(size, eps=eps, order=order, kernels=kernels, placement=placement)
        self.mlp_norm = AddRMSNorm(size, eps=eps, order=order, kernels=kernels, placement=placement)
        self.attention = Attention(shape, placement=placement, kernels=kernels)
        self.mlp = MLP(shape, placement=placement, kernels=kernels)

    def forward(
        self,
        x: Tensor,
        cos_SBD: Tensor,
        sin_SBD: Tensor,
        documents: Documents | None,
        modules: frozenset[Module] = NO_MODULES,
        core: CausalAttention | None = None,
    ) -> Tensor:
        """x_StBH | x_SBH -> the same. What ``modules`` put out is not kept for backward; ``core`` as in attention."""

        def add_mlp(x: Tensor, normed: Tensor) -> Tensor:
            out: Tensor = x + self.mlp(normed, modules)
            return out

        attended = self.attention(x, self.attention_norm, cos_SBD, sin_SBD, documents, modules, core)
        return feed(self.mlp_norm, add_mlp, attended, x, recompute="norms" in modules)

    def until_down(
        self, x: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """``forward`` up to its last linear: what ``down`` takes."""
        x, normed = self.mlp_norm(self.attention(x, self.attention_norm, cos_SBD, sin_SBD, documents), x)
        return x, self.mlp.product(normed)

    def down(self, x: Tensor, product_SBFt: Tensor) -> Tensor:
        """The rest of ``forward``."""
        out: Tensor = x + self.mlp.down(product_SBFt)
        return out

    def param_infos(self, prefix: str, *, stage: int) -> Iterator[ParamInfo]:
        """This block's rows of the parameter table.

        The two projections that write into the residual stream start smaller by sqrt(2 * num_layers), so that its
        variance does not grow with depth (GPT-2; Megatron-LM's ``scaled_init_method_normal``).
        """
        std = self.shape.init_std
        out_std = std / math.sqrt(2 * self.shape.num_layers)
        for name, norm in (("input_layernorm", self.attention_norm), ("post_attention_layernorm", self.mlp_norm)):
            yield from norm.param_infos(f"{prefix}.{name}", stage=stage, init=self.shape.norm_init)
        yield from self.attention.param_infos(f"{prefix}.self_attn", stage=stage, std=std, out_std=out_std)
        yield from self.mlp.param_infos(f"{prefix}.mlp", stage=stage, std=std, out_std=out_std)
