"""Sharded weights, whole where they are read: the order in which buckets are gathered and let go of."""

from collections.abc import Sequence

from megatron_aquila.optim.buckets import Bucket

MOST_WHOLE = 3  # the bucket that is read, the one before it, and the one that comes next


class Gathering:
    """Gathers ``buckets``, which lie in the order of the model, as they are read, the next one ahead.

    The next is the neighbour on the far side of the one that was read before: forward goes one way, backward the
    other. A guess that fails costs a gather, nothing else. What is gathered follows from the order of reads alone,
    which is the same on all replicas, as they run the same program. Of the others, what was read longest ago is let go
    of. At first none is whole.
    """

    def __init__(self, buckets: Sequence[Bucket], *, ahead: bool) -> None:
        self._buckets, self._ahead = tuple(buckets), ahead
        self._place = {bucket: place for place, bucket in enumerate(buckets)}
        self._whole: list[Bucket] = []  # gathered or on their way; the one read last is at the end
        self._last = 0

    def read(self, bucket: Bucket) -> None:
        """Make ``bucket`` whole, and begin to gather the next. Communicates: up to two all-gathers."""
        place = self._place[bucket]
        if self._whole and self._whole[-1] is bucket:
            bucket.finish_publish()
            return
        forward, self._last = place >= self._last, place
        following = place + (1 if forward else -1)
        self._hold(bucket)
        if self._ahead and 0 <= following < len(self._buckets):
            self._hold(self._buckets[following])
        self._hold(bucket)
        bucket.finish_publish()

    def let_go(self) -> None:
        """Forget all that is whole: the shards have changed, or are all that is wanted. Every step begins alike."""
        for bucket in self._whole:
            bucket.let_go()
        self._whole, self._last = [], 0

    def _hold(self, bucket: Bucket) -> None:
        """Gather ``bucket``, as the one read last; of the others only as many stay as may."""
        if bucket in self._whole:
            self._whole.remove(bucket)
        while len(self._whole) >= MOST_WHOLE:
            self._whole.pop(0).let_go()
        self._whole.append(bucket)
        bucket.begin_gather()
