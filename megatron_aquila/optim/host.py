"""The host's memory beside a device, and what travels between the two."""

import torch
from torch import Tensor

from megatron_aquila.optim.clip import Clip


class Host:
    """Host memory for a ``device``: pinned where that is a GPU; the device's own memory where that is the host.

    Copies from a GPU run on a stream of their own, beside what it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_apart = device.type == "cuda"
        self._memory = torch.device("cpu") if self._is_apart else device
        self._stream = torch.cuda.Stream(device) if self._is_apart else None  # type: ignore[no-untyped-call]  # torch has no types for it

    def like(self, x: Tensor) -> Tensor:
        """Memory for what ``x`` holds, 0 at first."""
        return torch.zeros(x.shape, dtype=x.dtype, device=self._memory, pin_memory=self._is_apart)

    def fetch(self, x: Tensor, out: Tensor) -> "Fetch":
        """Begin to copy ``x`` into ``out``, once the work on the device so far is done; ``x`` must last until then."""
        if self._stream is None:
            out.copy_(x)
            return Fetch(out, None)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            out.copy_(x, non_blocking=True)
            return Fetch(out, self._stream.record_event())

    def ask(self, clip: Clip, step: Tensor) -> "Question":
        """Begin to ask the device what an update must know of it; the answer does not queue behind what is fetched."""
        told = torch.stack([clip.norm, clip.factor, *(mark.to(clip.norm.dtype) for mark in (clip.applies, step))])
        out = self.like(told)
        out.copy_(told, non_blocking=True)
        arrived = torch.cuda.current_stream(told.device).record_event() if self._is_apart else None
        return Question(Fetch(out, arrived))

    def settle(self, device: torch.device) -> None:
        """Let the device wait, before its further work, for what is being fetched from it."""
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)


class Fetch:
    """A tensor on its way to the host."""

    def __init__(self, out: Tensor, arrived: torch.cuda.Event | None) -> None:
        self._out, self._arrived = out, arrived

    def wait(self) -> Tensor:
        """It, once it is there. The host waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._out


class Question:
    """How gradients are to be used, and the count of updates, on their way to the host."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def wait(self) -> tuple[Clip, Tensor]:
        """Both, as tensors on the host. The host waits for them: for every gradient of the step, that is."""
        norm, factor, applies, step = self._fetch.wait()
        return Clip(norm, factor, applies.bool()), step.long()
