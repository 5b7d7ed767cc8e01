"""Which buckets' optimizer states a rank keeps in its host's memory instead of its device's."""

from collections.abc import Sequence


def on_host(sizes: Sequence[int], share: float) -> tuple[bool, ...]:
    """For buckets of ``sizes`` elements, whether each is on the host: the largest, until they are ``share`` of all.

    Few large copies cost less than many small ones. Of equal ones the first; the same on every rank of the replicas.
    """
    chosen: set[int] = set()
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        if sum(sizes[one] for one in chosen) < share * sum(sizes):
            chosen.add(place)
    return tuple(place in chosen for place in range(len(sizes)))
