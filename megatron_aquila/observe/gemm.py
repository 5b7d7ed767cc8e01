"""The matrix-multiplication rate of this machine: what a run on a CPU is compared with."""

import time

import torch


def measure_gemm_flops(
    device: torch.device, dtype: torch.dtype = torch.float32, *, size: int = 512, seconds: float = 0.3
) -> float:
    """FLOP/s of a square matmul of ``size``, averaged over about ``seconds``, in this process with its own threads.

    Processes that share cores must measure at the same time: each then gets its true share, and the sum is the rate
    of the machine. Local: nothing is communicated.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    torch.mm(left, right, out=out)
    settle()
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        torch.mm(left, right, out=out)
        settle()
        count += 1
    return 2 * size**3 * count / elapsed
