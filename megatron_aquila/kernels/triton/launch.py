"""What every launch asks: rows in memory, how wide a block, how many warps and programs."""

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x`` (..., C) as (R, C) with neighbouring columns side by side: a view where strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def block_of(size: int) -> int:
    """The power of two that covers ``size``: Triton's blocks have no other widths."""
    return 1 << (size - 1).bit_length()


def num_warps(elements: int) -> int:
    """Warps for a program of so many elements: 16 a thread, two vector loads of 16 bytes in bfloat16; 16 at most."""
    return min(max(elements // (32 * 16), 1), 16)


def num_programs(num_rows: int, device: torch.device, *, per_processor: int) -> int:
    """Programs that share ``num_rows`` rows, so that all are resident at once and each keeps one partial sum.

    The interpreter, which runs them one after the other, gets two processors.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(num_rows, processors * per_processor)
