"""CUDA graphs: forward, backward and reduction of a step, recorded once and launched as a whole from then on.

Small shards of small models leave a GPU waiting for the host, which launches thousands of kernels a step. A recorded
step is one launch. It runs the same kernels on the same memory and no line of Python, so all that differs between two
steps has to lie in tensors: the microbatches and what the loss is multiplied with, which are copied to where they were
when it was recorded, and the sums of the loss, which are copied back.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from megatron_aquila.errors import AquilaError
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.collectives import all_reduce_
from megatron_aquila.parallel.context import Group
from megatron_aquila.train.loss import LossSums

Work = Callable[[Sequence[Batch], LossSums], None]  # makes the gradients and loss sums of a step's microbatches
Runner = Callable[[Work, Sequence[Batch], LossSums], None]  # does the work, in one way or another
WARM_UP = 3  # steps before one is recorded: kernels are compiled and chosen, communicators set up


def at_once(work: Work, batches: Sequence[Batch], sums: LossSums) -> None:
    """Do the work, a launch a kernel."""
    work(batches, sums)


class Capture(Protocol):
    """How a device's work is recorded."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do ``work`` where it would be recorded."""
        ...

    def settle(self) -> None:
        """Wait for the device. Raises what failed there."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` without doing it; what is returned does it, on the tensors that it was recorded with.

        Raises ``RuntimeError`` where ``work`` asks for a value on the device.
        """
        ...


class CudaCapture:
    """``torch.cuda.graph`` on a stream of its own, where the work is also warmed up: torch keeps things by stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do ``work`` on the stream, after what the current one has to do and before its further work."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def settle(self) -> None:
        """Wait for the device. Raises what failed there."""
        torch.cuda.synchronize(self._stream.device)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Waits for the device. What the work allocates stays the graph's; the next graph has the same memory."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            # The threads that read data, write checkpoints and watch NCCL may go on with what a capture forbids.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        return graph.replay


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step, and the tensors that it reads and fills."""

    batches: Sequence[Batch]
    sums: LossSums
    replay: Callable[[], None]

    def run(self, batches: Sequence[Batch], sums: LossSums) -> None:
        """The step of ``batches``, whose sums ``sums`` gets."""
        for own, batch in zip(self.batches, batches, strict=True):
            refill_(own, batch)
        self.sums.weigh_as_(sums)
        self.replay()
        sums.take_(self.sums)


class StepGraph:
    """A ``Runner`` that records a step once it is warm, and replays that for all further steps.

    One of another number of microbatches is recorded in its place, since batches grow and seldom shrink again; the old
    one goes after that, as both have the same memory. Before each step ``settle`` waits for what is under way on the
    device, which no recording may wait for. ``world`` is every rank, on the host: none replays what another could not
    record.
    """

    def __init__(self, capture: Capture, *, settle: Callable[[], None], world: Group, warm_up: int = WARM_UP) -> None:
        self._capture, self._settle, self._world, self._cold = capture, settle, world, warm_up
        self._recorded: Recorded | None = None

    def __call__(self, work: Work, batches: Sequence[Batch], sums: LossSums) -> None:
        """Do the work of ``batches`` and add it to ``sums``, which are empty.

        Communicates as ``work``, and where it is recorded once more, by one all-reduce over ``world``.

        Raises:
            AquilaError: it cannot be recorded, here or on another rank.
            torch.OutOfMemoryError: the device is full.
        """
        self._settle()
        if self._cold > 0:
            self._cold -= 1
            self._capture.warm_up(lambda: work(batches, sums))
            return
        recorded = self._recorded
        if recorded is None or len(recorded.batches) != len(batches):
            recorded = self._recorded = self._record_everywhere(work, batches, sums)
        recorded.run(batches, sums)

    def _record_everywhere(self, work: Work, batches: Sequence[Batch], sums: LossSums) -> Recorded:
        recorded, failure = None, None
        try:
            self._capture.settle()  # what failed on the device before is no matter of recording
            recorded = self._record(work, batches, sums)
        except Exception as error:  # whatever it is, no other rank may wait for this one
            failure = error
        num_failed = all_reduce_(torch.tensor(float(failure is not None)), self._world).item()
        if failure is not None:
            raise failure
        if recorded is None or num_failed > 0:
            raise AquilaError("--cuda-graph: another rank could not record its step; it says why")
        return recorded

    def _record(self, work: Work, batches: Sequence[Batch], sums: LossSums) -> Recorded:
        own_batches, own_sums = deepcopy((batches, sums))
        first: list[Exception] = []

        def step() -> None:
            own_sums.restart_()
            try:
                work(own_batches, own_sums)
            except Exception as error:  # the end of a capture that has failed raises an error of its own over it
                first.append(error)
                raise

        try:
            return Recorded(own_batches, own_sums, self._capture.record(step))
        except Exception as error:
            failure = first[0] if first else error
            if isinstance(failure, torch.OutOfMemoryError) or not isinstance(failure, RuntimeError):
                raise failure from error
            why = str(failure).partition("\n")[0]
            raise AquilaError(
                f"--cuda-graph: a step of {len(batches)} microbatches cannot be recorded: {why}; leave it out"
            ) from failure


def refill_(own: Batch, batch: Batch) -> None:
    """Copy the tensors of ``batch`` into those of ``own``. All else must be the same."""
    for field in fields(Batch):
        old, new = getattr(own, field.name), getattr(batch, field.name)
        was, now = (tuple(x.shape) if isinstance(x, Tensor) else x for x in (old, new))
        assert was == now, f"{field.name} was recorded as {was} and is {now}"
        if isinstance(old, Tensor):
            old.copy_(new, non_blocking=True)
