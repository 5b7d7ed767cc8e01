"""What the host learns of a device without stopping it: figures that travel by themselves, and moments of its time."""

import time

import torch
from torch import Tensor


class Moment:
    """A point in a device's work: on a GPU where its current stream comes to it, on a CPU now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._now = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types for it
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Seconds of the device's time between two of its moments; waits for this one."""
        if self._event is None or earlier._event is None:
            return self._now - earlier._now
        self.wait()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class Readback:
    """A small tensor on its way to the host, into pinned memory; on a CPU it is there. ``sent`` is the moment after it.

    Whatever the device does to the tensor later, this is what it held.
    """

    def __init__(self, x: Tensor) -> None:
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True) if x.is_cuda else torch.empty_like(x)
        self._host.copy_(x, non_blocking=True)
        self.sent = Moment(x.device)

    def read(self) -> list[float]:
        """The values of a vector. Waits until they are here: not at all, if the device has done much since."""
        self.sent.wait()
        values: list[float] = self._host.tolist()
        return values
