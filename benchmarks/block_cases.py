"""The kernels' cases of a block: norms, rotation, activation and attention."""

from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Cases, Size, Work, draw
from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from megatron_aquila.kernels.rope import rope_qkv_, rope_tables
from megatron_aquila.kernels.swiglu import swiglu_reference

EPS = 1e-5


def _rms_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    x = draw(device, dtype, size.seq_len, size.batch, size.shape.hidden_size)
    weight = 1 + draw(device, dtype, size.shape.hidden_size) / 4
    return Case(
        op="rms_norm",
        reference=rms_norm_reference,
        inputs=(x, weight),
        call=lambda kernel, x, weight: (kernel(x, weight, eps=EPS, order="aquila"),),
        forward=Work(2 * x.nbytes),
        backward=Work(3 * x.nbytes),
    )


def _add_rms_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    x, residual = (draw(device, dtype, size.seq_len, size.batch, size.shape.hidden_size) for _ in range(2))
    weight = 1 + draw(device, dtype, size.shape.hidden_size) / 4
    return Case(
        op="add_rms_norm",
        reference=add_rms_norm_reference,
        inputs=(x, residual, weight),
        call=lambda kernel, x, residual, weight: kernel(x, residual, weight, eps=EPS, order="aquila"),
        forward=Work(4 * x.nbytes),
        backward=Work(4 * x.nbytes),
    )


def _tables(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    positions_BS = torch.arange(size.seq_len, device=device).expand(size.batch, -1)
    return rope_tables(positions_BS, head_dim=size.shape.head_dim, base=10000.0, dtype=torch.float32)


def _rope_qkv(size: Size, device: torch.device, dtype: torch.dtype, *, interleaved: bool = False) -> Case:
    cos, sin = _tables(size, device)
    heads, kv_heads = size.shape.num_heads, size.shape.num_kv_heads
    form: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "interleaved": interleaved}
    qkv = draw(device, dtype, size.seq_len, size.batch, (heads + 2 * kv_heads) * size.shape.head_dim)
    turned = qkv.nbytes * (heads + kv_heads) // (heads + 2 * kv_heads)
    return Case(
        op="rope_qkv",
        reference=rope_qkv_,
        inputs=(qkv,),
        call=lambda kernel, qkv: kernel(qkv, cos, sin, **form),
        forward=Work(2 * turned),
        backward=Work(2 * qkv.nbytes),  # three gradients come, one goes
        sizes={"interleaved": interleaved},
    )


def _swiglu(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    gate_up = draw(device, dtype, size.seq_len, size.batch, 2 * size.shape.ffn_size)
    return Case(
        op="swiglu",
        reference=swiglu_reference,
        inputs=(gate_up,),
        call=lambda kernel, gate_up: (kernel(gate_up),),
        forward=Work(1.5 * gate_up.nbytes),
        backward=Work(2.5 * gate_up.nbytes),
    )


def _attention(size: Size, device: torch.device, dtype: torch.dtype, *, packed: bool = False) -> Case:
    """Of one sample: the reference holds S x S scores of every head. ``packed``: of documents of uneven lengths."""
    shape, seq_len = size.shape, size.seq_len
    q, k, v = (
        draw(device, dtype, seq_len, 1, count, shape.head_dim)
        for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    bounds = packed_bounds(seq_len) if packed else (0, seq_len)
    documents = None
    if packed:
        documents = Documents(bounds, torch.tensor(bounds, dtype=torch.int32, device=device))
    squares = sum((stop - start) ** 2 for start, stop in pairwise(bounds))
    flops = 2 * shape.num_heads * squares * shape.head_dim  # half of two products
    return Case(
        op="attention",
        reference=causal_attention_reference,
        inputs=(q, k, v),
        call=lambda kernel, q, k, v: (kernel(q, k, v, documents),),
        forward=Work(flops, "TFLOP/s"),
        backward=Work(2.5 * flops, "TFLOP/s"),  # five products for forward's two
        sizes={"has_documents": packed},
    )


def packed_bounds(seq_len: int) -> tuple[int, ...]:
    """Where documents begin and end in a sample: half of it, half of the rest, and so on, down to a 64th."""
    bounds = [0]
    while seq_len - bounds[-1] > max(1, seq_len // 32):
        bounds.append(bounds[-1] + (seq_len - bounds[-1] + 1) // 2)
    return (*bounds, seq_len)


BLOCK_CASES: Cases = MappingProxyType(
    {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rope_qkv": _rope_qkv,
        "rope_qkv, interleaved": partial(_rope_qkv, interleaved=True),
        "swiglu": _swiglu,
        "attention": _attention,
        "attention, packed documents": partial(_attention, packed=True),
    }
)
