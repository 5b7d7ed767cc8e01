"""How tensors travel between stages: over torch.distributed, or, in tests, through a dictionary."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.pipeline.action import Op


class Wire(Protocol):
    """Moves activations (``Op.F``) and their gradients (``Op.B``) to the stage that needs them."""

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        """Send ``x`` to ``stage``; it may still be under way on return. The caller does not change ``x`` afterwards."""
        ...

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        """The tensor sent to ``stage``, which is on this rank. Waits for it."""
        ...

    def flush(self) -> None:
        """Wait until everything sent has left. Nothing is in flight afterwards."""
        ...


class P2PWire:
    """Point to point between pipeline ranks: activations over ``ctx.pp``, gradients over ``ctx.pp_backward``.

    Every message has ``activation_shape`` and ``dtype``, so that nothing else is sent. Messages carry no tag (NCCL has
    none): the n-th receive from a rank takes its n-th send, which ``checks.check`` proves to be the right one. Stage
    ``s`` lives on pipeline rank ``s``.

    One message of each kind is under way: sending the next waits until the last was taken. Without that bound what was
    sent would pile up until the end of the step (gloo finishes a send only when it is waited for), and a failed send
    would go unnoticed. It cannot hang: ``checks.check`` also runs the schedule under this bound.
    """

    def __init__(self, ctx: ParallelContext, *, activation_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._groups = {Op.F: ctx.pp, Op.B: ctx.pp_backward}
        self._shape, self._dtype, self._device = activation_shape, dtype, ctx.device
        self._sending: dict[Op, tuple[dist.Work, Tensor]] = {}  # a tensor that is let go too soon closes the connection

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        """Communicates: one asynchronous send to the rank of ``stage``. Waits until the send before it was taken."""
        expected, given = (self._shape, self._dtype), (tuple(x.shape), x.dtype)
        assert given == expected, f"{op}{microbatch} for stage {stage} is {given}, every message is {expected}"
        group = self._groups[op]
        x = x.contiguous()
        work = dist.isend(x, group.ranks[stage], group=group.handle)
        assert work is not None, f"rank {group.ranks[group.rank]} sends through {group.name} but is not in it"
        before = self._sending.get(op)
        self._sending[op] = work, x
        if before is not None:
            before[0].wait()

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        """Communicates: one receive from the rank before (``Op.F``) or behind (``Op.B``) ``stage``.

        On CUDA the stream waits, not the host.
        """
        group = self._groups[op]
        source = group.ranks[stage - 1 if op is Op.F else stage + 1]
        x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        work = dist.irecv(x, source, group=group.handle)
        assert work is not None, f"rank {group.ranks[group.rank]} receives through {group.name} but is not in it"
        work.wait()
        return x

    def flush(self) -> None:
        """Communicates: waits for the last send of each kind."""
        for work, _ in self._sending.values():
            work.wait()
        self._sending.clear()


class LocalWire:
    """All stages in one process: a dictionary. Only for tests; a run uses ``P2PWire`` in a world of one too."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Op, int, int], Tensor] = {}

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        """Local: keeps ``x`` until it is asked for."""
        self._waiting[op, stage, microbatch] = x

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        """Local: hands over what was sent."""
        return self._waiting.pop((op, stage, microbatch))

    def flush(self) -> None:
        """Local: nothing may be left that nobody asked for."""
        assert not self._waiting, f"sent and never received: {[f'{s}{op}{m}' for op, s, m in self._waiting]}"
