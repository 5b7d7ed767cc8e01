"""For each op that kernels are chosen for: inputs at a model's sizes, how it is called, and the work it has to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_aquila.kernels.adamw import adamw_
from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from megatron_aquila.kernels.rope import rope_qkv_, rope_tables
from megatron_aquila.kernels.swiglu import swiglu_reference
from megatron_aquila.plan.shape import ModelShape

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Size:
    """A microbatch of a model."""

    shape: ModelShape
    seq_len: int
    batch: int


@dataclass(frozen=True, slots=True)
class Work:
    """The least that must be done: bytes to read and write, or floating-point operations."""

    amount: float
    unit: Literal["TB/s", "TFLOP/s"] = "TB/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """``call(kernel, *inputs)`` gives the outputs; where there is no ``backward`` it has no gradients."""

    reference: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    call: Callable[..., tuple[Tensor, ...]]
    forward: Work
    backward: Work = Work(0)

    @property
    def has_backward(self) -> bool:
        """Whether gradients are asked for."""
        return self.backward.amount > 0


def _draw(device: torch.device, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size, device=device, dtype=dtype)


def _rms_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    x = _draw(device, dtype, size.seq_len, size.batch, size.shape.hidden_size)
    weight = 1 + _draw(device, dtype, size.shape.hidden_size) / 4
    return Case(
        reference=rms_norm_reference,
        inputs=(x, weight),
        call=lambda kernel, x, weight: (kernel(x, weight, eps=EPS, order="aquila"),),
        forward=Work(2 * x.nbytes),
        backward=Work(3 * x.nbytes),
    )


def _add_rms_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    x, residual = (_draw(device, dtype, size.seq_len, size.batch, size.shape.hidden_size) for _ in range(2))
    weight = 1 + _draw(device, dtype, size.shape.hidden_size) / 4
    return Case(
        reference=add_rms_norm_reference,
        inputs=(x, residual, weight),
        call=lambda kernel, x, residual, weight: kernel(x, residual, weight, eps=EPS, order="aquila"),
        forward=Work(4 * x.nbytes),
        backward=Work(4 * x.nbytes),
    )


def _tables(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    positions_BS = torch.arange(size.seq_len, device=device).expand(size.batch, -1)
    return rope_tables(positions_BS, head_dim=size.shape.head_dim, base=10000.0, dtype=torch.float32)


def _rope_qkv(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    cos, sin = _tables(size, device)
    heads, kv_heads = size.shape.num_heads, size.shape.num_kv_heads
    qkv = _draw(device, dtype, size.seq_len, size.batch, (heads + 2 * kv_heads) * size.shape.head_dim)
    turned = qkv.nbytes * (heads + kv_heads) // (heads + 2 * kv_heads)
    return Case(
        reference=rope_qkv_,
        inputs=(qkv,),
        call=lambda kernel, qkv: kernel(qkv, cos, sin, num_heads=heads, num_kv_heads=kv_heads),
        forward=Work(2 * turned),
        backward=Work(2 * qkv.nbytes),  # three gradients come, one goes
    )


def _swiglu(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    gate_up = _draw(device, dtype, size.seq_len, size.batch, 2 * size.shape.ffn_size)
    return Case(
        reference=swiglu_reference,
        inputs=(gate_up,),
        call=lambda kernel, gate_up: (kernel(gate_up),),
        forward=Work(1.5 * gate_up.nbytes),
        backward=Work(2.5 * gate_up.nbytes),
    )


def _attention(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    shape, batch = size.shape, 1  # the reference holds S x S scores of every head
    q, k, v = (
        _draw(device, dtype, size.seq_len, batch, count, shape.head_dim)
        for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    flops = 2 * batch * shape.num_heads * size.seq_len**2 * shape.head_dim  # half of two products
    return Case(
        reference=causal_attention_reference,
        inputs=(q, k, v),
        call=lambda kernel, q, k, v: (kernel(q, k, v),),
        forward=Work(flops, "TFLOP/s"),
        backward=Work(2.5 * flops, "TFLOP/s"),  # five products for forward's two
    )


def _adamw(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    del dtype  # an optimizer keeps float32
    shape = size.shape
    count = 2 * shape.ffn_size * shape.hidden_size
    param, grad, exp_avg = (_draw(device, torch.float32, count) for _ in range(3))
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    numbers = {"step": torch.tensor(3), "factor": torch.tensor(0.5, dtype=torch.float64), "applies": torch.tensor(True)}
    scalars = {name: number.to(device) for name, number in numbers.items()}

    def call(kernel: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
        kernel(*tensors, **settings, **scalars)
        return tensors

    return Case(
        reference=adamw_,
        inputs=(param, grad, exp_avg, _draw(device, torch.float32, count).square()),
        call=call,
        forward=Work(7 * param.nbytes),  # four are read, three written
    )


CASES: Mapping[str, Callable[[Size, torch.device, torch.dtype], Case]] = MappingProxyType(
    {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rope_qkv": _rope_qkv,
        "swiglu": _swiglu,
        "attention": _attention,
        "adamw": _adamw,
    }
)


def _liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def kernel(x: Tensor, weight: Tensor, *, eps: float, order: str) -> Any:
        del order  # it has Llama's, whose roundings differ from Aquila's
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    return kernel


def _liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def kernel(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: str) -> Any:
        del order  # as above
        normed, total = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
        return total, normed

    return kernel


def _liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


LIGER: Mapping[str, Callable[[], Callable[..., Any]]] = MappingProxyType(
    {"rms_norm": _liger_rms_norm, "add_rms_norm": _liger_add_rms_norm, "swiglu": _liger_swiglu}
)
