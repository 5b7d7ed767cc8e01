"""This process's place in the grid and the groups it talks through. Built once, passed everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_aquila.plan.grid import Axis, RankGrid

Ranks = tuple[int, ...]  # global ranks, ascending
Link = tuple[str, bool, int]  # "F" or "B", to a higher rank, from an odd rank (or to one): see ``pp_link``


@dataclass(frozen=True, slots=True)
class Group:
    """One communication group. Size 1 means that every collective through it is the identity.

    ``rank`` is this process's place in it, ``ranks`` are its members.
    """

    name: str
    rank: int
    size: int
    ranks: Ranks
    handle: dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Where this process stands and whom it talks to.

    ``cp`` joins the ranks that share the tokens of a sample.
    ``pp`` joins the ranks of one pipeline, ``pp_links`` carry its messages: see ``pp_link``. ``dp_cp`` joins the
    replicas of one parameter: gradients are summed and optimizer states sharded over it. ``world`` joins all, and so
    does ``host_world``, which carries tensors on the CPU. Groups of the same ranks share a communicator, links
    excepted: each one costs memory on every GPU, and time at the start.
    """

    grid: RankGrid
    rank: int
    device: torch.device
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    pp_links: Mapping[Link, Group]
    dp_cp: Group
    world: Group
    host_world: Group

    @classmethod
    def create(
        cls,
        grid: RankGrid,
        device: torch.device,
        timeout: timedelta | None = None,
        *,
        pp_turns_back: bool = False,
    ) -> "ParallelContext":
        """Make every group of the grid. Collective: all ranks call it, in the same order.

        ``pp_turns_back``: activations also go to lower pipeline ranks, and gradients to higher ones.
        The default process group must be up unless the grid is a world of one; it serves where a group is the world,
        with its own timeout.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert world == grid.world_size, f"{grid} needs {grid.world_size} processes, there are {world}"

        everyone = tuple(range(world))
        handles: dict[tuple[tuple[Ranks, ...], Link | str | None], dist.ProcessGroup | None] = {
            ((everyone,), None): dist.group.WORLD
        }

        def group(name: str, *axes: Axis, own: Link | str | None = None) -> Group:
            """``own``: with a communicator that no other group has, for whatever ranks."""
            partition = tuple(grid.groups(*axes))
            (mine,) = (ranks for ranks in partition if rank in ranks)
            if len(mine) > 1 and (partition, own) not in handles:
                made = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in partition}  # collective
                handles[partition, own] = made[mine]
            return Group(name, mine.index(rank), len(mine), mine, handles[partition, own] if len(mine) > 1 else None)

        # The world's own communicator would make what it agrees on wait for the weights that dp_cp still gathers.
        # With two ranks there is no link but the even one. The first, activations to a higher rank, may share.
        kinds = [
            (op, up, odd)
            for odd in range(min(2, grid.pp - 1))
            for op in ("F", "B")
            for up in ((True, False) if pp_turns_back else (op == "F",))
        ]
        world_group = group("world", "tp", "cp", "dp", "pp")
        alone = len(grid.groups("dp", "cp")) == 1 or 1 == grid.dp < grid.cp  # nor may a ring wait for gradients
        return cls(
            grid=grid,
            rank=rank,
            device=device,
            tp=group("tp", "tp"),
            cp=group("cp", "cp"),
            dp=group("dp", "dp"),
            pp=group("pp", "pp"),
            pp_links={link: group("pp_link", "pp", own=link if index else None) for index, link in enumerate(kinds)},
            dp_cp=group("dp_cp", "dp", "cp", own="dp_cp" if alone else None),
            world=world_group,
            host_world=_on_host(world_group, timeout),
        )

    def pp_link(self, op: str, source: int, target: int) -> Group:
        """The group in which pipeline rank ``source`` sends ``target`` its activations ("F") or gradients ("B").

        Each rank meets one other in it, and only sends or only receives: in one NCCL communicator a rank's messages
        wait for each other, so that one it sends would wait for one it awaits. Hence groups by what travels, whether to
        a higher rank, and whether the lower of the two is odd.
        """
        link = op, target > source, min(source, target) % 2
        assert link in self.pp_links, f"{op} from pipeline rank {source} to {target}: no such link was made"
        return self.pp_links[link]

    @classmethod
    def single(cls, device: torch.device | None = None) -> "ParallelContext":
        """The world of one: no process group, the same code path."""
        return cls.create(RankGrid(), device if device is not None else torch.device("cpu"))


def _on_host(world: Group, timeout: timedelta | None) -> Group:
    """The same ranks over a backend that carries tensors on the CPU: of the usual ones only NCCL does not. Collective.

    What ranks agree on there waits for their hosts and for no GPU.
    """
    if world.handle is None or dist.get_backend(world.handle) != "nccl":
        return world
    return replace(world, handle=dist.new_group(list(world.ranks), timeout=timeout, backend="gloo"))
