"""What a rank keeps in its host's memory instead of its device's: which buckets' optimizer states, and which layers'
activations; and what that takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields


def on_host(sizes: Sequence[int], share: float) -> tuple[bool, ...]:
    """For buckets of ``sizes`` elements, whether each is on the host: the largest, until they are ``share`` of all.

    Few large copies cost less than many small ones. Of equal ones the first; the same on every rank of the replicas.
    """
    chosen: set[int] = set()
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        if sum(sizes[one] for one in chosen) < share * sum(sizes):
            chosen.add(place)
    return tuple(place in chosen for place in range(len(sizes)))


def spread(num_units: int, wanted: int) -> frozenset[int]:
    """Of ``num_units`` layers, or groups of layers that are recomputed together, the ``wanted`` whose activations wait
    on the host: the first, whose backward is farthest, and the others as far apart as can be.

    So each copy has the time that the layers up to the next one take.
    """
    count = min(wanted, num_units)
    return frozenset(index * num_units // count for index in range(count))


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes that one rank's offloaded shards and activations take on its host. Beside a GPU all but masters and states
    are pinned.

    ``gradients`` as they are summed up, and ``weights``, are copies of the device's: what travels. With 32-bit weights
    and more those copies are the masters.
    """

    gradients: int
    weights: int
    master_weights: int
    optimizer_states: int
    activations: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(getattr(self, part.name) for part in fields(self))
