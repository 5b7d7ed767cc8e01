"""Rotary position embedding of a whole q, k, v projection in place, and back."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aquila.kernels.triton.launch import block_of, num_warps

ELEMENTS = 4096  # of a program: heads of one token, which share a row of the tables


@triton.jit
def rope_rotate(
    x, out, cos, sin, num_samples, x_stride_s, x_stride_b, x_stride_n, out_stride_s, out_stride_b, out_stride_n,
    cos_stride_s, cos_stride_b, sin_stride_s, sin_stride_b, num_heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token. ``out`` may be ``x``: a program stores only what it has loaded before."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // num_samples, token % num_samples
    pair = tl.arange(0, BLOCK)
    c = tl.load(cos + s * cos_stride_s + b * cos_stride_b + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    t = tl.load(sin + s * sin_stride_s + b * sin_stride_b + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if BACK:
        t = -t
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    source = x + s * x_stride_s + b * x_stride_b + (head * x_stride_n)[:, None]
    target = out + s * out_stride_s + b * out_stride_b + (head * out_stride_n)[:, None]
    if INTERLEAVED:
        feature = tl.arange(0, 2 * BLOCK)[None, :]
        inside = (head < num_heads)[:, None] & (feature < 2 * HALF)
        both = tl.load(source + feature, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (HEADS, BLOCK, 2)))
        turned = tl.reshape(tl.join(first * c - second * t, second * c + first * t), (HEADS, 2 * BLOCK))
        tl.store(target + feature, turned.to(out.dtype.element_ty), mask=inside)
    else:
        feature = pair[None, :]
        inside = (head < num_heads)[:, None] & (feature < HALF)
        first = tl.load(source + feature, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + feature, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + feature, (first * c - second * t).to(out.dtype.element_ty), mask=inside)
        tl.store(target + HALF + feature, (second * c + first * t).to(out.dtype.element_ty), mask=inside)


def _turn(
    x_SBND: Tensor, out_SBND: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, *, back: bool, interleaved: bool
) -> Tensor:
    """Write ``x_SBND`` turned, or turned ``back``, to ``out_SBND``, which may be the same; the latter is returned."""
    seq_len, num_samples, num_heads, head_dim = x_SBND.shape
    assert cos_SBD.shape == sin_SBD.shape == (seq_len, num_samples, head_dim), (
        f"tables {tuple(cos_SBD.shape)} and {tuple(sin_SBD.shape)} do not fit {tuple(x_SBND.shape)}"
    )
    strides = (x_SBND.stride(-1), out_SBND.stride(-1), cos_SBD.stride(-1), sin_SBD.stride(-1))
    assert strides == (1, 1, 1, 1), f"features must lie side by side, not {strides} apart"
    block = block_of(head_dim // 2)
    heads = min(block_of(max(num_heads, 1)), max(ELEMENTS // (2 * block), 1))
    if x_SBND.numel() > 0:
        rope_rotate[(seq_len * num_samples, triton.cdiv(num_heads, heads))](
            x_SBND, out_SBND, cos_SBD, sin_SBD, num_samples, *x_SBND.stride()[:3], *out_SBND.stride()[:3],
            *cos_SBD.stride()[:2], *sin_SBD.stride()[:2], num_heads,
            HALF=head_dim // 2, BLOCK=block, HEADS=heads, BACK=back, INTERLEAVED=interleaved,
            num_warps=num_warps(heads * 2 * block),
        )  # fmt: skip
    return out_SBND


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(qkv_SBP: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of q and k together, of q, of k and of v, each (S, B, heads, D)."""
    heads_SBND = torch.unflatten(qkv_SBP, -1, (num_heads + 2 * num_kv_heads, -1))
    turning, v = heads_SBND[:, :, : num_heads + num_kv_heads], heads_SBND[:, :, num_heads + num_kv_heads :]
    return turning, turning[:, :, :num_heads], turning[:, :, num_heads:], v


def _unrelated(view: Tensor) -> Tensor:
    """The same memory as a tensor that autograd takes for a new one."""
    alias = torch.empty(0, dtype=view.dtype, device=view.device)
    return alias.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


class RopeQkv(torch.autograd.Function):
    """In place forward; backward writes the projection's gradient as one tensor, q and k turned back and v as it came.

    ``qkv`` is marked dirty and returned first: autograd then refuses it where a producer has kept it for its own
    backward, and a gradient that comes to it afterwards is refused here. q, k and v share its memory without being
    views in autograd's eyes, which would cut the gradient into one padded tensor each and add them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_SBP: Tensor,
        cos_SBD: Tensor,
        sin_SBD: Tensor,
        num_heads: int,
        num_kv_heads: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``qkv``, and q, k and v within its memory."""
        ctx.mark_dirty(qkv_SBP)
        ctx.save_for_backward(cos_SBD, sin_SBD)
        ctx.shape, ctx.interleaved = (num_heads, num_kv_heads), interleaved
        ctx.set_materialize_grads(False)
        turning, q, k, v = _heads(qkv_SBP, num_heads, num_kv_heads)
        _turn(turning, turning, cos_SBD, sin_SBD, back=False, interleaved=interleaved)
        return qkv_SBP, _unrelated(q), _unrelated(k), _unrelated(v)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_qkv: Tensor | None, grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None
    ) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient of the projection."""
        assert grad_qkv is None, "the projection was used after its rotation in place"
        cos_SBD, sin_SBD = ctx.saved_tensors
        like = next(grad for grad in (grad_q, grad_k, grad_v) if grad is not None)
        num_heads, num_kv_heads = ctx.shape
        grad = like.new_empty(*like.shape[:2], (num_heads + 2 * num_kv_heads) * like.shape[-1])
        _, *parts = _heads(grad, num_heads, num_kv_heads)
        for part, came, turns in zip(parts, (grad_q, grad_k, grad_v), (True, True, False), strict=True):
            if came is None:
                part.zero_()
            elif turns:
                _turn(_side_by_side(came), part, cos_SBD, sin_SBD, back=True, interleaved=ctx.interleaved)
            else:
                part.copy_(came)
        return grad, None, None, None, None, None
