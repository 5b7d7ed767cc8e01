"""liger-kernel's kernels as ours are called, by the name of the case; imported when they are asked for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from benchmarks.case import Kernel, Make
from megatron_aquila.kernels.rope import split_qkv


def _liger_rms_norm() -> Kernel:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def kernel(x: Tensor, weight: Tensor, *, eps: float, order: str) -> Any:
        del order  # it has Llama's, whose roundings differ from Aquila's
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    return kernel


def _liger_add_rms_norm() -> Kernel:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def kernel(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: str) -> Any:
        del order  # as above
        normed, total = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
        return total, normed

    return kernel


def _liger_swiglu() -> Kernel:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def _liger_rope_qkv() -> Kernel:
    from liger_kernel.ops.rope import LigerRopeFunction

    def kernel(qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, interleaved: bool) -> Any:
        assert not interleaved, "it turns halves"
        q, k, v = split_qkv(qkv, num_heads=num_heads, num_kv_heads=num_kv_heads)
        q, k = (x.permute(1, 2, 0, 3) for x in (q, k))  # its layout, for which it copies
        q, k, *_ = LigerRopeFunction.apply(q, k, cos.transpose(0, 1), sin.transpose(0, 1))
        return *(x.permute(2, 0, 1, 3) for x in (q, k)), v

    return kernel


def liger_linear_cross_entropy() -> Kernel:
    """``kernel(x_RH, weight, labels_R)``: the mean loss. Raises ``ImportError`` where liger-kernel is not installed."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, labels: loss(weight, x, labels)


LIGER: Mapping[str, Make] = MappingProxyType(
    {
        "rms_norm": _liger_rms_norm,
        "add_rms_norm": _liger_add_rms_norm,
        "rope_qkv": _liger_rope_qkv,
        "swiglu": _liger_swiglu,
    }
)
