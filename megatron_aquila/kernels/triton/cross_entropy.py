"""The loss's two parts: a row's statistics in one read of its logits, and the gradient in their place in one more."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_aquila.kernels.triton.launch import block_of, num_warps

BLOCK = 4096


@triton.jit
def cross_entropy_statistics(
    logits, columns, is_mine, out, row_stride, num_columns, num_real, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    """A row: its sum of exponentials over the largest logit so far, which each block may raise.

    Padded columns are loaded as far as they share a block with real ones: only a mask that ends at a multiple of 16
    leaves loads whole. Where the largest is infinite nothing is subtracted, as torch's logsumexp does.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    count = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, num_real, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_real = column < num_real
        value = tl.load(logits + row * row_stride + column, mask=column < num_columns, other=0.0).to(tl.float32)
        value = tl.where(is_real, value, float("-inf"))
        above = tl.maximum(largest, tl.max(value, axis=0))
        shift = tl.where(tl.abs(above) == float("inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(value - shift), axis=0)
        if TOP:
            here = tl.sum(((value == above) & is_real).to(tl.float32), axis=0)
            count = tl.where(largest == above, count, 0.0) + here
        largest = above
    num_rows = tl.num_programs(0)
    shift = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    tl.store(out + row, shift + tl.log(total))
    mine = tl.load(is_mine + row)
    label = tl.load(logits + row * row_stride + tl.load(columns + row), mask=mine, other=0.0)
    tl.store(out + num_rows + row, label.to(tl.float32))
    if TOP:
        tl.store(out + 2 * num_rows + row, tl.where(total == total, largest, total))  # what is not a number stays so
        tl.store(out + 3 * num_rows + row, count)


@triton.jit
def cross_entropy_gradient(
    logits, columns, is_mine, log_sum, weights, top, top_grad, row_stride, num_columns, num_real,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row, in the order of ``softmax_gradient_``; a thread stores only what it has loaded itself."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.where(tl.load(is_mine + row), tl.load(columns + row), -1)
    log = tl.load(log_sum + row)
    weight = tl.load(weights + row)
    for start in tl.range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        at = logits + row * row_stride + column
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.exp(value - log) - (column == label).to(tl.float32)
        if TOP:
            grad += tl.where(value == tl.load(top + row), tl.load(top_grad + row), 0.0)
        grad = tl.where(column < num_real, grad * weight, 0.0)
        tl.store(at, grad.to(logits.dtype.element_ty), mask=inside)


def _check(logits_RV: Tensor, *per_row: Tensor) -> None:
    num_rows, num_columns = logits_RV.shape
    assert logits_RV.stride(1) == 1 or num_columns == 1, f"logits of a row lie {logits_RV.stride(1)} apart"
    assert all(value.shape == (num_rows,) for value in per_row), (
        f"{num_rows} rows of logits, and {[tuple(value.shape) for value in per_row]}"
    )


def statistics(
    logits_RV: Tensor, columns_R: Tensor, is_mine_R: Tensor, *, num_real: int, with_top: bool = False
) -> Tensor:
    """What ``softmax_statistics_triton`` says."""
    _check(logits_RV, columns_R, is_mine_R)
    num_rows, num_columns = logits_RV.shape
    out = torch.empty(4 if with_top else 2, num_rows, dtype=torch.float32, device=logits_RV.device)
    block = min(BLOCK, block_of(num_columns))
    if num_rows > 0:
        cross_entropy_statistics[(num_rows,)](
            logits_RV, columns_R.contiguous(), is_mine_R.contiguous(), out, logits_RV.stride(0), num_columns, num_real,
            TOP=with_top, BLOCK=block, num_warps=num_warps(block),
        )  # fmt: skip
    return out


def gradient_(
    logits_RV: Tensor,
    columns_R: Tensor,
    is_mine_R: Tensor,
    log_sum_R: Tensor,
    weights_R: Tensor,
    *,
    num_real: int,
    top: tuple[Tensor, Tensor] | tuple[()] = (),
) -> None:
    """What ``softmax_gradient_triton_`` says."""
    of_top = top or (log_sum_R, weights_R)
    per_row = (columns_R, is_mine_R, log_sum_R, weights_R, *of_top)
    _check(logits_RV, *per_row)
    wide = [value.dtype for value in per_row[2:]]
    assert set(wide) == {torch.float32}, f"numbers of each row are float32, not {wide}"
    num_rows, num_columns = logits_RV.shape
    block = min(BLOCK, block_of(num_columns))
    if num_rows > 0:
        cross_entropy_gradient[(num_rows,)](
            logits_RV, *(value.contiguous() for value in per_row), logits_RV.stride(0), num_columns, num_real,
            TOP=len(top) > 0, BLOCK=block, num_warps=num_warps(block),
        )  # fmt: skip
