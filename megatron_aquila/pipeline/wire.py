"""How tensors travel between stages: over torch.distributed, or on one rank through a dictionary."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.staging import staged
from megatron_aquila.parallel.trail import Tracked, Waitable, tracked
from megatron_aquila.pipeline.action import Op

Message = tuple[Op, int, int]  # what it is, the stage it is for, the microbatch


class Wire(Protocol):
    """Moves activations (``Op.F``) and their gradients (``Op.B``) to the stage that needs them."""

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        """Send ``x`` to ``stage``; it may still be under way on return. The caller does not change ``x`` afterwards."""
        ...

    def expect(self, op: Op, stage: int, microbatch: int) -> None:
        """What ``recv`` will be asked for next: it may travel from now on. Messages are expected in that order."""
        ...

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        """The tensor sent to ``stage``, which is on this rank. Waits for it."""
        ...

    def flush(self) -> None:
        """Wait until everything sent has left. Nothing is in flight afterwards."""
        ...


class P2PWire:
    """Point to point between pipeline ranks, each link (what is sent, from whom, to whom) in a group of its own.

    ``stage_rank`` is the pipeline rank of every stage; between two stages of one rank a tensor is handed over. Every
    message has ``activation_shape`` and ``dtype``, so that nothing else is sent. Messages carry no tag (NCCL has none):
    the n-th receive from a rank takes its n-th send over that link, which ``checks.check`` proves to be the right one.

    ``depth`` messages are under way on a link: sending one more waits until the first of them was taken. Without that
    bound what was sent would pile up until the end of the step (gloo finishes a send only when it is waited for), and a
    failed send would go unnoticed. It cannot hang: ``checks.check`` also runs the schedule under this bound. With
    ``overlap`` a receive is posted when it is expected, else when it is needed.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        *,
        stage_rank: Sequence[int],
        activation_shape: tuple[int, ...],
        dtype: torch.dtype,
        depth: int = 1,
        overlap: bool = True,
    ) -> None:
        self._ctx, self._stage_rank, self._depth, self._overlap = ctx, tuple(stage_rank), depth, overlap
        self._shape, self._dtype, self._device = activation_shape, dtype, ctx.device
        self._here = LocalWire()
        # By what is sent and to whom, oldest first. Work and tensor are kept: gloo closes a connection if either goes.
        self._sending: dict[tuple[Op, int], deque[tuple[Tracked, Tensor]]] = {}
        self._expected: dict[Message, tuple[Tracked, Tensor]] = {}

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        """Communicates: one asynchronous send to the rank of ``stage``, or none if that is this one.

        Waits until the ``depth``-th send before it over the same link was taken.
        """
        expected, given = (self._shape, self._dtype), (tuple(x.shape), x.dtype)
        assert given == expected, f"{op}{microbatch} for stage {stage} is {given}, every message is {expected}"
        own, target = self._ctx.pp.rank, self._stage_rank[stage]
        if target == own:
            self._here.send(op, stage, microbatch, x)
            return
        link, x = self._ctx.pp_link(op, own, target), x.contiguous()
        ends = link.ranks[own], link.ranks[target]
        begin = staged(lambda _, x: dist.isend(x, ends[1], group=link.handle), link)
        work = self._launch("send", x, link, ends, lambda: begin(x[:0], x))
        sending = self._sending.setdefault((op, target), deque())
        sending.append((work, x))
        if len(sending) > self._depth:
            sending.popleft()[0].wait()

    def expect(self, op: Op, stage: int, microbatch: int) -> None:
        """Communicates: with overlap, one asynchronous receive from the rank before or behind ``stage``."""
        if self._overlap and self._source(op, stage) != self._ctx.pp.rank:
            self._expected[op, stage, microbatch] = self._receive(op, stage)

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        """Communicates: one receive, unless it was expected or the tensor comes from this rank.

        On CUDA the stream waits, not the host.
        """
        if self._source(op, stage) == self._ctx.pp.rank:
            return self._here.recv(op, stage, microbatch)
        posted = self._expected.pop((op, stage, microbatch), None)
        work, x = self._receive(op, stage) if posted is None else posted
        work.wait()
        return x

    def flush(self) -> None:
        """Communicates: waits for the last sends of each link."""
        for sending in self._sending.values():
            while sending:
                sending.popleft()[0].wait()
        assert not self._expected, f"expected and never received: {_spelled(self._expected)}"
        self._here.flush()

    def _source(self, op: Op, stage: int) -> int:
        """The rank from which ``stage`` receives: the stage before sends activations, the one behind gradients."""
        return self._stage_rank[stage - 1 if op is Op.F else stage + 1]

    def _receive(self, op: Op, stage: int) -> tuple[Tracked, Tensor]:
        source = self._source(op, stage)
        link = self._ctx.pp_link(op, source, self._ctx.pp.rank)
        x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        ends = link.ranks[source], self._ctx.rank
        begin = staged(lambda x, _: dist.irecv(x, ends[0], group=link.handle), link)
        return self._launch("recv", x, link, ends, lambda: begin(x, x[:0])), x

    def _launch(
        self, op: str, x: Tensor, link: Group, ends: tuple[int, int], begin: Callable[[], Waitable | None]
    ) -> Tracked:
        work = tracked(link.trail, op, x, begin, link=ends)
        assert work is not None, f"rank {self._ctx.rank} has a {op} through {link.name} but is not in it"
        return work


class LocalWire:
    """All stages in one process: a dictionary. What a ``P2PWire`` does between two stages of its rank."""

    def __init__(self) -> None:
        self._waiting: dict[Message, Tensor] = {}

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        """Local: keeps ``x`` until it is asked for."""
        self._waiting[op, stage, microbatch] = x

    def expect(self, op: Op, stage: int, microbatch: int) -> None:
        """Local: nothing has to be on its way."""

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        """Local: hands over what was sent."""
        return self._waiting.pop((op, stage, microbatch))

    def flush(self) -> None:
        """Local: nothing may be left that nobody asked for."""
        assert not self._waiting, f"sent and never received: {_spelled(self._waiting)}"


def _spelled(messages: Iterable[Message]) -> list[str]:
    return [f"{stage}{op}{microbatch}" for op, stage, microbatch in messages]
