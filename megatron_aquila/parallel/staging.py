"""Transfers through the host's memory, for a backend that cannot read a device's: gloo between processes on GPUs.

It is slow, and for what NCCL refuses: several processes that share one GPU, as where a layout is tried out on it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.trail import Waitable

Transfer = Callable[[Tensor, Tensor], Waitable | None]  # begins one: what it fills, and what it reads


def staged(begin: Transfer, group: Group) -> Transfer:
    """``begin``, on copies in the host's memory where the group needs them. They are whole before it begins.

    What is filled is whole once it was waited for, or at once where ``begin`` leaves nothing to wait for.
    """
    return through_host(begin) if group.through_host else begin


def through_host(begin: Transfer) -> Transfer:
    """``begin`` on copies in the host's memory; what it reads and fills may be one tensor."""

    def on_copies(out: Tensor, x: Tensor) -> Waitable | None:
        sent = x.to("cpu", copy=True)
        filled = sent if out is x else torch.empty_like(out, device="cpu")
        work = begin(filled, sent)
        if work is None:
            out.copy_(filled)
            return None
        return _Staged(work, out, filled, sent)

    return on_copies


class _Staged:
    """A transfer under way on copies, which are kept until it is done."""

    def __init__(self, work: Waitable, out: Tensor, filled: Tensor, sent: Tensor) -> None:
        self._work, self._out, self._filled, self._sent = work, out, filled, sent

    def wait(self) -> None:
        """Until it is done and what it fills is filled."""
        self._work.wait()
        self._out.copy_(self._filled)
