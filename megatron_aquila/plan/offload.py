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


def pinned_bytes(num_bytes: int) -> int:
    """What a pinned buffer of ``num_bytes`` takes: torch makes it the next power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes that one rank's offloaded shards and activations take on its host. Beside a GPU all but masters and states
    are pinned, each in ``pinned_bytes``: a buffer of either kind for each bucket, and one for each layer's activations.

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
