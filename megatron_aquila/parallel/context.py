"""This process's place in the grid and the groups it talks through. Built once, passed everywhere."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_aquila.plan.grid import Axis, RankGrid


@dataclass(frozen=True, slots=True)
class Group:
    """One communication group. Size 1 means that every collective through it is the identity.

    ``rank`` is this process's place in it, ``ranks`` the global ranks of its members, ascending.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Where this process stands and whom it talks to.

    ``pp`` carries activations forward and ``pp_backward`` gradients back: two communicators, because with one an NCCL
    rank that sends an activation while its neighbour sends a gradient would wait for ever. ``dp_cp`` joins the replicas
    of one parameter: gradients are summed and optimizer states sharded over it. ``world`` joins all.
    """

    grid: RankGrid
    rank: int
    device: torch.device
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    pp_backward: Group
    dp_cp: Group
    world: Group

    @classmethod
    def create(cls, grid: RankGrid, device: torch.device, timeout: timedelta | None = None) -> "ParallelContext":
        """Make every group of the grid. Collective: all ranks call it, in the same order.

        The default process group must be up unless the grid is a world of one.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert world == grid.world_size, f"{grid} needs {grid.world_size} processes, there are {world}"

        def group(name: str, *axes: Axis) -> Group:
            mine = None
            for ranks in grid.groups(*axes):
                handle = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
                if rank in ranks:
                    mine = Group(name, ranks.index(rank), len(ranks), ranks, handle)
            assert mine is not None, f"rank {rank} is in no {name} group of {grid}"
            return mine

        return cls(
            grid=grid,
            rank=rank,
            device=device,
            tp=group("tp", "tp"),
            cp=group("cp", "cp"),
            dp=group("dp", "dp"),
            pp=group("pp", "pp"),
            pp_backward=group("pp_backward", "pp"),
            dp_cp=group("dp_cp", "dp", "cp"),
            world=group("world", "tp", "cp", "dp", "pp"),
        )

    @classmethod
    def single(cls, device: torch.device | None = None) -> "ParallelContext":
        """The world of one: no process group, the same code path."""
        return cls.create(RankGrid(), device if device is not None else torch.device("cpu"))
