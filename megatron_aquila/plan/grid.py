"""Rank arithmetic: the world of ranks as a box of axes. Every law of this file is tested without a process."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

Axis = Literal["tp", "cp", "dp", "pp"]
ORDER: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")  # tp fastest: its neighbours share NVLink


@dataclass(frozen=True, kw_only=True, slots=True)
class RankGrid:
    """A world of ``tp * cp * dp * pp`` ranks. ``tp`` varies fastest, ``pp`` slowest, as in Megatron-LM.

    ``zero_group``: of the dp x cp ranks that hold a parameter, so many consecutive ones share out what ZeRO shards, and
    the next ones do the same; None: all of them.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    zero_group: int | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def size(self, *axes: Axis) -> int:
        """Number of ranks in a group along ``axes``."""
        return math.prod(getattr(self, axis) for axis in axes)

    @property
    def num_shards(self) -> int:
        """Ranks among which ZeRO's shards are the whole."""
        return self.size("dp", "cp") if self.zero_group is None else self.zero_group

    @property
    def num_copies(self) -> int:
        """Ranks that hold the same shard."""
        return self.size("dp", "cp") // self.num_shards

    def num_pieces(self, *, in_rank_order: bool) -> int:
        """Among how many ranks the first step of a sum over replicas is split; in rank order over all of them."""
        return self.num_shards * (self.num_copies if in_rank_order else 1)

    def coords(self, rank: int) -> dict[Axis, int]:
        """Position of ``rank`` along each axis."""
        assert 0 <= rank < self.world_size, f"rank {rank} is outside a world of {self.world_size}"
        out: dict[Axis, int] = {}
        for axis in ORDER:
            rank, out[axis] = divmod(rank, getattr(self, axis))
        return out

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Rank at a position; the inverse of ``coords``."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """Every group whose members differ only along ``axes``, e.g. ``groups("dp", "cp")``.

        Members are in ascending order of rank; the groups partition the world.
        """
        free = [axis for axis in ORDER if axis in axes]
        fixed = [axis for axis in ORDER if axis not in axes]

        def positions(names: list[Axis]) -> list[dict[Axis, int]]:
            values = product(*(range(getattr(self, axis)) for axis in reversed(names)))
            return [dict(zip(reversed(names), value, strict=True)) for value in values]

        return [tuple(self.rank(**at, **step) for step in positions(free)) for at in positions(fixed)]

    def shard_groups(self) -> list[tuple[int, ...]]:
        """Every group of ranks whose shards are the whole: ``groups("dp", "cp")``, each cut into ``num_copies``."""
        size = self.num_shards
        return [ranks[at : at + size] for ranks in self.groups("dp", "cp") for at in range(0, len(ranks), size)]

    def copy_groups(self) -> list[tuple[int, ...]]:
        """Every group of ranks that hold the same shard, one of each group of shards."""
        return [ranks[at :: self.num_shards] for ranks in self.groups("dp", "cp") for at in range(self.num_shards)]
