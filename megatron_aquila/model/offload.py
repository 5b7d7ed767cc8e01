"""Activations that wait in the host's memory for their backward.

Hooks on saved tensors see whatever a layer keeps, by its own Functions and by torch's. A storage travels once, whole,
however many saved tensors are views of it; they are made again over the storage that comes back. What others hold stays
on the device, since nothing would be gained: weights, what all layers share, and leaves of the graph.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_aquila.plan.offload import pinned_bytes, spread

Unit = Callable[[Tensor], Tensor]  # a layer, or layers that are recomputed together
Arrived = torch.cuda.Event | None  # None where copies are made at once


class HostActivations:
    """The host's side of a rank: buffers that are used again and again, and a way there and one back.

    Beside a GPU buffers are pinned and each way is a stream of its own; elsewhere the same steps are plain copies.
    ``wanted``: of how many of a stage's layers the activations leave, as ``plan.offload.spread`` chooses them.
    """

    def __init__(self, device: torch.device, *, wanted: int) -> None:
        self.device, self.wanted = device, wanted
        self.outward, self.back = _Way(device), _Way(device)
        self._free: list[Buffer] = []
        self.num_bytes = 0  # of all buffers

    def run(self, units: Sequence[Unit], x: Tensor, shared: Sequence[Tensor]) -> Tensor:
        """``units`` one after the other; what the chosen ones keep for backward leaves. ``shared`` tensors stay. Local.

        A unit's memory is free once the next chosen one ran, or the last of all; it comes back while, in backward, that
        one is at work again. Without gradients nothing is kept.
        """
        chosen = spread(len(units), self.wanted) if torch.is_grad_enabled() else frozenset()
        trip: Trip | None = None
        for number, unit in enumerate(units):
            before = trip
            if number in chosen:
                trip = Trip(self, stays=[*shared, x] if x.is_leaf else shared)
                with saved_tensors_hooks(trip.pack, trip.unpack):
                    x = unit(x)
                trip.leave()
            else:
                x = unit(x)
            if before is not None and (number in chosen or number == len(units) - 1):
                before.settle()
                # once the gradient of this unit's output is there, its backward is next
                x.register_hook(before.fetch)  # type: ignore[no-untyped-call]  # torch has no types for it
        if trip is not None:
            trip.settle()
        return x

    def take(self, num_bytes: int) -> "Buffer":
        """A buffer of at least ``num_bytes``, the smallest there is, or a new one."""
        fitting = [buffer for buffer in self._free if buffer.memory.nbytes >= num_bytes]
        if fitting:
            buffer = min(fitting, key=lambda buffer: buffer.memory.nbytes)
            self._free.remove(buffer)
            return buffer
        is_apart = self.device.type == "cuda"
        where = torch.device("cpu") if is_apart else self.device
        taken = pinned_bytes(num_bytes) if is_apart else num_bytes
        self.num_bytes += taken
        return Buffer(torch.empty(taken, dtype=torch.uint8, device=where, pin_memory=is_apart))

    def give(self, buffer: "Buffer") -> None:
        """Whoever takes it next writes once it was ``read``."""
        self._free.append(buffer)


@dataclass(eq=False, slots=True)
class Buffer:
    """Bytes on the host; ``read`` once what was last copied from them is on the device."""

    memory: Tensor
    read: Arrived = None


class _Way:
    """Copies in one direction: beside a GPU's work on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: Arrived = None) -> Arrived:
        """Begin to copy, of each pair to the first from the second, once the device's work so far and ``after`` are
        done. All tensors must last until the device has waited for what is returned.
        """
        if self._stream is None:
            for out, x in pairs:
                out.copy_(x)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for out, x in pairs:
                out.copy_(x, non_blocking=True)
            arrived: Arrived = self._stream.record_event()
            return arrived

    def wait(self, arrived: Arrived) -> None:
        """Let the device wait for copies before its further work."""
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)


@dataclass(eq=False, slots=True)
class _Storage:
    """One storage of saved tensors. ``here``: its bytes on the device, None while they are away."""

    here: Tensor | None
    num_bytes: int


class _View(NamedTuple):
    """A saved tensor: how it lay in its storage."""

    storage: _Storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Trip:
    """What one unit keeps of one microbatch, to the host and back.

    Whoever holds a ``_View`` holds its storage. The trip itself holds them until they are on their way back; from then
    on each is freed as soon as autograd has used it.
    """

    def __init__(self, host: HostActivations, *, stays: Sequence[Tensor]) -> None:
        self._host = host
        self._stay = {x.untyped_storage()._cdata for x in stays}
        self._storages: dict[int, _Storage] = {}
        self._saved: list[tuple[Tensor, int]] = []  # with the version of each, until they are gone
        self._buffer: Buffer | None = None
        self._give: Callable[[], object]  # the buffer, back to the host; once
        self._left: Arrived = None
        self._arrived: Arrived = None

    def pack(self, x: Tensor) -> Any:
        """Take ``x`` along, unless it stays: then it is what is saved."""
        storage = x.untyped_storage()
        is_value = x.is_floating_point() and x.device == self._host.device and storage.nbytes() > 0
        if not is_value or isinstance(x, nn.Parameter) or storage._cdata in self._stay:
            return x
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = _Storage(_bytes_of(x), storage.nbytes())
        self._saved.append((x.detach(), x._version))
        return _View(self._storages[storage._cdata], x.dtype, x.size(), x.stride(), x.storage_offset())

    def unpack(self, packed: Any) -> Tensor:
        """What was packed. The device waits for it."""
        if isinstance(packed, Tensor):
            return packed
        view: _View = packed
        self.fetch()
        self._host.back.wait(self._arrived)
        assert view.storage.here is not None, f"{view.storage.num_bytes} bytes of a saved tensor did not come back"
        nothing = torch.empty(0, dtype=view.dtype, device=self._host.device)
        return nothing.set_(view.storage.here.untyped_storage(), view.offset, view.size, view.stride)

    def leave(self) -> None:
        """Begin to copy everything to the host."""
        if not self._storages:
            return
        self._buffer = self._host.take(sum(storage.num_bytes for storage in self._storages.values()))
        # also if no backward comes: then at the end of the graph, which holds this
        self._give = finalize(self, self._host.give, self._buffer)
        pairs = [(there, here) for here, there in self._pairs(self._buffer)]
        self._left = self._host.outward.copy(pairs, after=self._buffer.read)

    def settle(self) -> None:
        """Let the device wait until everything has left, and its memory go."""
        self._host.outward.wait(self._left)
        changed = [tuple(x.shape) for x, version in self._saved if x._version != version]
        assert not changed, f"saved tensors of {changed} were changed before they had left"
        self._saved.clear()
        if self._buffer is not None:
            for storage in self._storages.values():
                storage.here = None

    def fetch(self, _grad: Tensor | None = None) -> None:
        """Begin to bring everything back, once. Also a hook: it leaves the gradient as it is."""
        if self._buffer is None:
            return
        self.settle()
        for storage in self._storages.values():
            storage.here = torch.empty(storage.num_bytes, dtype=torch.uint8, device=self._host.device)
        self._arrived = self._buffer.read = self._host.back.copy(self._pairs(self._buffer))
        self._give()
        self._buffer = None
        self._storages.clear()

    def _pairs(self, buffer: Buffer) -> list[tuple[Tensor, Tensor]]:
        """Each storage's bytes on the device and on the host."""
        heres = [storage.here for storage in self._storages.values() if storage.here is not None]
        used = sum(here.nbytes for here in heres)
        return list(zip(heres, torch.split(buffer.memory[:used], [here.nbytes for here in heres]), strict=True))


def _bytes_of(x: Tensor) -> Tensor:
    """The whole storage of ``x``."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
