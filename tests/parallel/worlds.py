"""What the tests of this room share: worlds of tensor-parallel ranks, counted collectives, distances."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool

CPU = torch.device("cpu")


@functools.cache
def tp_group(size: int) -> Group:
    """In a worker: the tensor-parallel group of a world of ``size``; without workers, the group of one."""
    return ParallelContext.create(RankGrid(tp=size), CPU).tp


def on_ranks(pool: Callable[[int], WorkerPool], size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``fn(size, *args)`` on every rank of a world; a world of one runs here, with no process group at all."""
    return [fn(1, *args)] if size == 1 else pool(size).run(fn, size, *args)


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the error as a share of the reference's norm."""
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def share(full: torch.Tensor, group: Group, dim: int = 0) -> torch.Tensor:
    """This rank's equal slice of a tensor that every rank holds, as a leaf of its own."""
    return full.detach().chunk(group.size, dim)[group.rank].clone().requires_grad_(full.is_floating_point())


NAMES = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


class CountCollectives(TorchDispatchMode):
    """Counts what reaches torch.distributed, whatever our shim calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            self.counts[NAMES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))
