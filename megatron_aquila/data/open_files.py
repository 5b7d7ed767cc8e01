"""Hundreds of data sets are thousands of mapped files, each of which counts as open: the usual limit is 1024."""

from typing import Final

from megatron_aquila.errors import DataError

FILES_OF_A_SET: Final = 2  # .bin and .idx
FILES_OF_AN_INDEX: Final = 3
OTHERS: Final = 256  # what the rest of a process may have open
ROOM: Final = 4  # a run that goes on into further epochs has more indices, and indices are opened before others close


def allow_open_files(num_sets: int, *, num_indices: int) -> None:
    """Raise this process's limit of open files to ``ROOM`` times what so many data sets and indices need.

    Nothing happens where it is higher; where the system allows less, as much as it allows.

    Raises:
        DataError: the system does not allow what they need.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = num_sets * FILES_OF_A_SET + num_indices * FILES_OF_AN_INDEX + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed * ROOM:
        return
    allowed = needed * ROOM if hard == resource.RLIM_INFINITY else min(hard, needed * ROOM)
    if allowed < needed:
        raise DataError(
            f"--data-path: {num_sets} data sets and their indices are about {needed} open files, and this process may "
            f"open {hard}; raise the limit with ulimit -Hn {needed}, or merge data sets with aquila data merge"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
