"""Checks of what must hold between ranks at any time. The trainer makes them every ``--check-replicas`` steps."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_aquila.parallel.collectives import gather_objects
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import ParamInfo


class ReplicaError(RuntimeError):
    """Ranks that must hold the same values do not: a wrong gradient reduction, or a machine that computes wrongly."""


def check_replicated(infos: Iterable[ParamInfo], ctx: ParallelContext) -> None:
    """Raise ``ReplicaError`` unless all ranks that hold the same rectangle of a parameter hold the same bits.

    Covers dp and cp replicas and weights replicated over tp alike. Copies every parameter to the CPU; two all-gathers
    over the world.
    """
    digests = [
        [part.name, *part.offset, _digest(info.param[part.local_row : part.local_row + part.shape[0]])]
        for info in infos
        for part in info.parts
    ]
    holders: dict[tuple[str | int, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(gather_objects(digests, ctx.world)):
        for *rectangle, digest in theirs:
            holders[tuple(rectangle)][digest].append(rank)
    apart = [
        f"{name} at {tuple(offset)}: ranks {' differ from ranks '.join(map(str, ranks.values()))}"
        for (name, *offset), ranks in holders.items()
        if len(ranks) > 1
    ]
    if apart:
        raise ReplicaError("replicas have drifted apart:\n" + "\n".join(apart))


def _digest(x: Tensor) -> str:
    data = x.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
