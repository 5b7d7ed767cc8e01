"""From step reports to the figures of the log: rates, shares of the hardware, and the time left."""

import time
from collections import deque
from collections.abc import Callable

from megatron_aquila.observe.report import StepReport

Value = float | int | str
Row = dict[str, Value]

GIB = 2**30
WINDOW_STEPS = 50  # the time left follows the rate of this many steps


class ThroughputMeter:
    """Turns each ``StepReport`` into one row of the log.

    FLOPs per token come in two conventions: ``flops_per_token`` counts attention causally and gives ``mfu``; of
    ``attention_flops_per_token``, attention's part of it, a step counts what its documents leave.
    ``flops_per_token_full`` counts all of S x S, as PaLM's convention does, and gives ``mfu_full_attention``. Both
    count forward and backward once. ``recomputed_flops_per_token``, and attention's part of them, are what is computed
    a second time: where there are any, ``hfu`` counts them too. ``peak_flops`` is the dense data-sheet peak of one
    device, in FLOP/s; without it there is no MFU. With ``multiplies_in_fp8`` the share of that peak is not one: it is
    ``bf16_equivalent``. ``gemm_flops`` is the rate measured for one rank of a CPU run: it
    gives ``gemm_share``, which is not an MFU and never called one.

    ``total_samples`` is where this run ends. The time left follows the wall clock of this process only, validation and
    checkpoints included, so it is right after a resume.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        flops_per_token_full: float,
        attention_flops_per_token: float = 0.0,
        recomputed_flops_per_token: float = 0.0,
        recomputed_attention_flops_per_token: float = 0.0,
        num_devices: int,
        total_samples: int,
        peak_flops: float | None = None,
        multiplies_in_fp8: bool = False,
        gemm_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._attention_flops_per_token = attention_flops_per_token
        self._recomputed_flops_per_token = recomputed_flops_per_token
        self._recomputed_attention_flops_per_token = recomputed_attention_flops_per_token
        self._flops_per_token_full = flops_per_token_full
        self._num_devices = num_devices
        self._total_samples = total_samples
        self._peak_flops = peak_flops
        self._multiplies_in_fp8 = multiplies_in_fp8
        self._gemm_flops = gemm_flops
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS + 1)  # (clock, consumed samples)

    def pass_over(self, report: StepReport) -> None:
        """Take note of a step that gets no row: only the time left needs it."""
        now = self._clock()
        if not self._seen:  # the step itself is the only evidence; start-up before it is not the rate of the run
            self._seen.append((now - report.seconds, report.consumed_samples - report.global_batch))
        self._seen.append((now, report.consumed_samples))

    def row(self, report: StepReport) -> Row:
        """The figures of one step. Times are in seconds, memory in GiB, shares between 0 and 1."""
        tokens_per_second = report.computed_tokens / report.seconds
        device_tokens = tokens_per_second / self._num_devices
        masked = 1 - report.attention_share
        flops_per_token = self._flops_per_token - self._attention_flops_per_token * masked
        recomputed = self._recomputed_flops_per_token - self._recomputed_attention_flops_per_token * masked
        row: Row = {
            "step": report.step,
            "consumed_samples": report.consumed_samples,
            "batch_size": report.global_batch,
            "num_tokens": report.num_tokens,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "loss_scale": report.loss_scale,
            "applied": int(report.applied),
            "seconds": report.seconds,
            "data_seconds": report.data_seconds,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": device_tokens,
            "tflops_per_device": device_tokens * flops_per_token / 1e12,
            "memory_gib": report.memory_bytes / GIB,
            "seconds_left": self._seconds_left(report),
        }
        if report.z_loss is not None:
            row["z_loss"] = report.z_loss
        if self._peak_flops is not None and self._multiplies_in_fp8:
            row["bf16_equivalent"] = device_tokens * flops_per_token / self._peak_flops
        elif self._peak_flops is not None:
            row["mfu"] = device_tokens * flops_per_token / self._peak_flops
            if recomputed > 0:
                row["hfu"] = device_tokens * (flops_per_token + recomputed) / self._peak_flops
            row["mfu_full_attention"] = device_tokens * self._flops_per_token_full / self._peak_flops
        if self._gemm_flops is not None:
            row["gemm_share"] = device_tokens * flops_per_token / self._gemm_flops
        return row | {f"loss/{source}": loss for source, loss in report.source_loss.items()}

    def _seconds_left(self, report: StepReport) -> float:
        self.pass_over(report)
        (first, first_samples), (last, last_samples) = self._seen[0], self._seen[-1]
        rate = (last - first) / (last_samples - first_samples)
        return rate * max(0, self._total_samples - report.consumed_samples)
