"""This process's place in the grid and the groups it talks through. Built once, passed everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_aquila.parallel.trail import SILENT, GroupTrail, Trail
from megatron_aquila.plan.grid import RankGrid

Ranks = tuple[int, ...]  # global ranks, ascending
Link = tuple[str, bool, int]  # "F" or "B", to a higher rank, from an odd rank (or to one): see ``pp_link``


@dataclass(frozen=True, slots=True)
class Group:
    """One communication group. Size 1 means that every collective through it is the identity.

    ``rank`` is this process's place in it, ``ranks`` are its members. ``trail`` is told of what it transfers.
    ``through_host``: its backend cannot read the device's memory, see ``staging``.
    """

    name: str
    rank: int
    size: int
    ranks: Ranks
    handle: dist.ProcessGroup | None
    trail: GroupTrail = field(default=SILENT, compare=False, repr=False)
    through_host: bool = False


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Where this process stands and whom it talks to.

    ``cp`` joins the ranks that share the tokens of a sample.
    ``pp`` joins the ranks of one pipeline, ``pp_links`` carry its messages: see ``pp_link``. ``dp_cp`` joins the
    replicas of one parameter, over which gradients are summed. ``shards`` joins those among which optimizer states,
    and whatever else ZeRO shards, are the whole: all of them or, by ``grid.zero_group``, neighbours; ``copies`` then
    joins those that hold the same shard. ``world`` joins all, and so does ``host_world``, which carries tensors on the
    CPU. Groups of the same ranks share a communicator, links excepted: each one costs memory on every GPU, and time at
    the start.
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
    shards: Group
    copies: Group
    world: Group
    host_world: Group
    trail: Trail = field(default=SILENT, compare=False, repr=False)

    @classmethod
    def create(
        cls,
        grid: RankGrid,
        device: torch.device,
        timeout: timedelta | None = None,
        *,
        pp_turns_back: bool = False,
        trail: Trail = SILENT,
    ) -> "ParallelContext":
        """Make every group of the grid. Collective: all ranks call it, in the same order.

        ``pp_turns_back``: activations also go to lower pipeline ranks, and gradients to higher ones.
        The default process group must be up unless the grid is a world of one; it serves where a group is the world,
        with its own timeout. ``trail`` is told of every transfer.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert world == grid.world_size, f"{grid} needs {grid.world_size} processes, there are {world}"

        everyone = tuple(range(world))
        handles: dict[tuple[tuple[Ranks, ...], Link | str | None], dist.ProcessGroup | None] = {
            ((everyone,), None): dist.group.WORLD
        }

        def group(name: str, groups: Sequence[Ranks], own: Link | str | None = None) -> Group:
            """This rank's of ``groups``; ``own``: with a communicator that no other has, for whatever ranks."""
            partition = tuple(groups)
            (mine,) = (ranks for ranks in partition if rank in ranks)
            if len(mine) == 1:
                return Group(name, 0, 1, mine, None)
            label = " ".join([name, *map(str, own)]) if isinstance(own, tuple) else name
            if (partition, own) not in handles:
                handles[partition, own] = _join(partition, mine, label, timeout)
            handle = handles[partition, own]
            through_host = device.type == "cuda" and dist.get_backend(handle) == "gloo"
            return Group(name, mine.index(rank), len(mine), mine, handle, trail.group(label, mine), through_host)

        # The world's own communicator would make what it agrees on wait for the weights that dp_cp still gathers.
        kinds = _links(grid.pp, turns_back=pp_turns_back)
        world_group = group("world", [everyone])
        replicas = grid.groups("dp", "cp")
        alone = len(replicas) == 1 or 1 == grid.dp < grid.cp  # nor may a ring wait for gradients
        return cls(
            grid=grid,
            rank=rank,
            device=device,
            tp=group("tp", grid.groups("tp")),
            cp=group("cp", grid.groups("cp")),
            dp=group("dp", grid.groups("dp")),
            pp=group("pp", grid.groups("pp")),
            pp_links={link: group("pp_link", grid.groups("pp"), link if i else None) for i, link in enumerate(kinds)},
            dp_cp=(dp_cp := group("dp_cp", replicas, "dp_cp" if alone else None)),
            shards=dp_cp if grid.num_copies == 1 else group("shards", grid.shard_groups(), "shards"),
            copies=group("copies", grid.copy_groups(), "copies"),
            world=world_group,
            host_world=_on_host(world_group, timeout, trail),
            trail=trail,
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


def _links(pp: int, *, turns_back: bool) -> list[Link]:
    """With two ranks there is no link but the even one. The first, activations to a higher rank, may share."""
    return [
        (op, up, odd)
        for odd in range(min(2, pp - 1))
        for op in ("F", "B")
        for up in ((True, False) if turns_back else (op == "F",))
    ]


def _join(partition: Sequence[Ranks], mine: Ranks, name: str, timeout: timedelta | None) -> dist.ProcessGroup:
    """Make the groups of a partition of the world; this rank's, ``mine``. Collective.

    At once where the world can be split. Else one by one: of NCCL each would be a split of the whole world, from which
    all but its members come away with nothing. ``name`` is what NCCL's flight recorder calls them.
    """
    world = dist.group.WORLD
    assert world is not None, f"{name}: the default process group is not up"
    if _is_splittable(world):
        # torch 2.11 tells the parts apart by their lowest ranks; before, by a hash that could join two of them in one.
        made = dist.split_group(world, [list(ranks) for ranks in partition], timeout=timeout, group_desc=name)
    else:
        one_by_one = {ranks: dist.new_group(list(ranks), timeout=timeout, group_desc=name) for ranks in partition}
        made = one_by_one[mine]
    assert made is not None, f"{name}: rank {dist.get_rank()} is to be in {mine}, torch put it into no group"
    found = tuple(dist.get_process_group_ranks(made))
    assert found == mine, f"{name}: rank {dist.get_rank()} is to be in {mine}, torch put it into {found}"
    return made


def _is_splittable(world: dist.ProcessGroup) -> bool:
    """Whether it is NCCL's own, without a wrapper that debugs, and has connected: it has once bound to its device."""
    device = world.bound_device_id
    return device is not None and dist.get_backend(world) == "nccl" and world._get_backend(device).supports_splitting


def _on_host(world: Group, timeout: timedelta | None, trail: Trail) -> Group:
    """The same ranks over a backend that carries tensors on the CPU: of the usual ones only NCCL does not. Collective.

    What ranks agree on there waits for their hosts and for no GPU.
    """
    if world.handle is None or dist.get_backend(world.handle) != "nccl":
        return world
    handle = dist.new_group(list(world.ranks), timeout=timeout, backend="gloo", group_desc="host_world")
    return replace(world, handle=handle, trail=trail.group("host_world", world.ranks))
