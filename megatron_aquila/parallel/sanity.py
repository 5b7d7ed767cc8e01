"""Checks of what must hold between ranks at any time. The trainer makes them every ``--check-replicas`` steps."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron_aquila.errors import ReplicaError
from megatron_aquila.parallel.collectives import all_gather, all_reduce_, gather_objects
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.params import ParamInfo, Part

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COLUMNS, BLOCK = 1024, 2**22  # elements; what is summed at once needs no copy, only its sums
ODD, EVEN = 0x5851F42D4C957F2D, 0x2545F4914F6CDD1E  # multiplied with an odd number, no bit of a difference is lost


def check_replicated(
    infos: Iterable[ParamInfo],
    ctx: ParallelContext,
    *,
    not_masters: Sequence[str] = (),
    alike_at: int = 0,
    read: Callable[[nn.Parameter], None] = lambda param: None,
) -> None:
    """Raise ``ReplicaError`` on all ranks unless those that hold the same rectangle of a parameter hold the same bits.

    Covers dp and cp replicas and weights replicated over tp alike. ``not_masters`` are this rank's tensors whose
    weights are not what their masters say; ``alike_at`` is the last step at which all was well. ``read`` is called
    before a parameter is read, one after the other. Compares checksums made on the device: reads every parameter once;
    one small all-gather over the replicas, one over tp, one all-reduce between the hosts. Only where something is
    wrong, the ranks tell each other what: the odd ones of more than two are named.
    """
    parts = [(info, part) for info in infos for part in info.parts]
    sums = torch.stack([_checksum_of(info, part, read) for info, part in parts])
    whole = torch.tensor([part.shape == part.global_shape for _, part in parts], device=sums.device)
    differ = _differ(sums, torch.ones_like(whole), ctx.dp_cp) | _differ(sums, whole, ctx.tp)
    told = torch.tensor([float(bool(differ) or len(not_masters) > 0)], dtype=torch.float64)
    if all_reduce_(told, ctx.host_world, "max").item() == 0:
        return
    table = [[part.name, *part.offset, value] for (_, part), value in zip(parts, sums.tolist(), strict=True)]
    found = gather_objects([table, list(not_masters)], ctx.world)
    lines = [*apart([theirs for theirs, _ in found])]
    for rank, (_, names) in enumerate(found):
        lines += [f"{name}: the weights that rank {rank} published are not its masters, rounded" for name in names]
    lines.append(
        f"at step {alike_at} they were still the same: resume from a checkpoint of that step or before it, later ones "
        "may hold the error; where the same rank differs again, leave its machine out"
    )
    raise ReplicaError("replicas have drifted apart:\n" + "\n".join(lines))


def apart(tables: Sequence[Sequence[Sequence[str | int]]]) -> list[str]:
    """Which ranks hold other bits than others of the same rectangle, from each rank's rows of name, offset, checksum.

    Where most ranks agree, the others are named; of two that differ nobody can say which is right.
    """
    holders: dict[tuple[str | int, ...], dict[str | int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, rows in enumerate(tables):
        for *rectangle, value in rows:
            holders[tuple(rectangle)][value].append(rank)
    return [
        f"{name} at {tuple(offset)}: {_odd_ones(by_value)}"
        for (name, *offset), by_value in holders.items()
        if len(by_value) > 1
    ]


def checksum(x: Tensor) -> Tensor:
    """A 0-dim int64 of the bits of ``x``, on its device: a flipped bit changes it, as does nearly any other change.

    Sums of rows and of columns, weighted by place, modulo 2^64: the order of the additions does not matter, and equal
    bits give equal sums on every device. Local; waits for nothing.
    """
    bits = x.detach().contiguous().flatten().view(BITS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for block in torch.split(bits, BLOCK):
        rows = len(block) // COLUMNS
        body, tail = block[: rows * COLUMNS].view(rows, COLUMNS), block[rows * COLUMNS :]
        by_column, by_row = body.sum(0, dtype=torch.int64), body.sum(1, dtype=torch.int64)
        total = total * ODD + _weighted(by_column) + EVEN * _weighted(by_row) + ODD * _weighted(tail.to(torch.int64))
    return total


def rows_of(info: ParamInfo, part: Part) -> Tensor:
    """The rows of a parameter that hold one of its parts."""
    return info.param[part.local_row : part.local_row + part.shape[0]]


def _checksum_of(info: ParamInfo, part: Part, read: Callable[[nn.Parameter], None]) -> Tensor:
    read(info.param)
    return checksum(rows_of(info, part))


def _weighted(sums: Tensor) -> Tensor:
    return (sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum()


def _differ(sums: Tensor, counts: Tensor, group: Group) -> Tensor:
    """Whether a sum that counts on all ranks is not the same on all, a 0-dim bool on the device. One all-gather."""
    rows = all_gather(torch.stack([sums, counts.to(sums.dtype)]), group).view(group.size, 2, -1)
    return ((rows[:, 0] != rows[0, 0]) & rows[:, 1].bool().all(0)).any()


def _odd_ones(by_value: Mapping[str | int, Sequence[int]]) -> str:
    most, *others = sorted(map(list, by_value.values()), key=len, reverse=True)
    if len(most) > sum(map(len, others)):
        odd = sorted(rank for ranks in others for rank in ranks)
        return f"{_ranks(odd)} {'differs' if len(odd) == 1 else 'differ'} from {_ranks(most)}"
    return f"{' and '.join(map(_ranks, sorted(map(list, by_value.values()))))} differ, and neither is a majority"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
