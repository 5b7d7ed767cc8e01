"""Sharded gradients and weights (ZeRO-2 and 3): which buckets a rank's work reduces and gathers, how often, and what of
them has memory.

The same steps as ``optim.buckets`` and ``optim.gathering`` take with tensors; tests hold them together.
"""

from collections.abc import Iterable, Iterator, Sequence

from megatron_aquila.plan.buckets import StageBucket
from megatron_aquila.plan.work import Work

MOST_WHOLE = 3  # as of optim.gathering; a test holds the two together


def bucket_of(buckets: Sequence[StageBucket]) -> dict[tuple[int, int | None], int]:
    """The bucket of each parameter, by its stage and its place there."""
    return {(bucket.stage, place): index for index, bucket in enumerate(buckets) for place in bucket.places}


class Gathered:
    """What ``optim.gathering.Gathering`` does with ``buckets`` that are read: all-gathers, and which are whole.

    ``ahead``: the next one is gathered, too. ``times``: how often each was. ``state`` is what decides all that follows.
    """

    def __init__(self, buckets: Sequence[StageBucket], *, ahead: bool) -> None:
        self._sizes, self._ahead = [bucket.elements for bucket in buckets], ahead
        self.times = [0] * len(buckets)
        self.state: tuple[tuple[int, ...], int] = (), 0  # those that are whole, the one held last at the end; last read

    @property
    def elements(self) -> int:
        """Of all buckets that are whole."""
        return sum(self._sizes[one] for one in self.state[0])

    def read(self, place: int) -> None:
        """The bucket at ``place`` is read, after it or before it its neighbour on the far side of the one before."""
        whole, last = self.state
        if whole[-1:] == (place,):
            return
        following = place + (1 if place >= last else -1)
        whole = self._hold(whole, place)
        if self._ahead and 0 <= following < len(self._sizes):
            whole = self._hold(whole, following)
        self.state = self._hold(whole, place), place

    def _hold(self, whole: tuple[int, ...], place: int) -> tuple[int, ...]:
        self.times[place] += place not in whole
        others = tuple(one for one in whole if one != place)
        return (*others[-(MOST_WHOLE - 1) :], place)


class Rounds:
    """What ``optim.buckets.Bucket`` and the optimizer do with sharded gradients in ``buckets``: reductions, and which
    are whole.

    With ``overlap`` a bucket is reduced while others are added to. ``times``: how often each was. ``state`` is what
    decides all that follows.
    """

    def __init__(self, buckets: Sequence[StageBucket], *, overlap: bool) -> None:
        self._sizes, self._overlap = [bucket.elements for bucket in buckets], overlap
        self._parameters = [len(bucket.places) for bucket in buckets]
        self.times = [0] * len(buckets)
        # those that are whole, the one of them that is reduced, and how many parameters of each have no gradient yet
        self.state: tuple[frozenset[int], int | None, tuple[int, ...]] = frozenset(), None, tuple(self._parameters)

    @property
    def elements(self) -> int:
        """Of all buckets that are whole."""
        return sum(self._sizes[one] for one in self.state[0])

    @property
    def reducing(self) -> int:
        """Elements of the bucket that is reduced."""
        return 0 if self.state[1] is None else self._sizes[self.state[1]]

    def add(self, bucket: int) -> None:
        """Something is added to a bucket."""
        if self.state[1] == bucket:
            self._bring_in()
        there, reducing, missing = self.state
        self.state = there | {bucket}, reducing, missing

    def done(self, bucket: int) -> bool:
        """A parameter's gradient of a microbatch is complete: with it, perhaps, a round. Whether one is reduced.

        Then without ``overlap`` ``settle`` is next.
        """
        there, reducing, missing = self.state
        left = missing[bucket] - 1
        missing = (*missing[:bucket], left or self._parameters[bucket], *missing[bucket + 1 :])
        self.state = there, reducing, missing
        if left > 0 or bucket not in there or reducing == bucket:
            return False
        self._reduce(bucket)
        return True

    def settle(self) -> None:
        """Between two steps of work: without ``overlap`` what is reduced is awaited."""
        if not self._overlap:
            self._bring_in()

    def finish(self) -> None:
        """The end of the step: what is left is reduced."""
        self._bring_in()
        for bucket in sorted(self.state[0]):
            self._reduce(bucket)
            self._bring_in()

    def _reduce(self, bucket: int) -> None:
        self._bring_in()
        self.times[bucket] += 1
        there, _, missing = self.state
        self.state = there, bucket, missing

    def _bring_in(self) -> None:
        there, reducing, missing = self.state
        self.state = there - {reducing}, None, missing


def calls(
    works: Iterable[tuple[int, Work]], buckets: Sequence[StageBucket], *, overlap: bool
) -> Iterator[tuple[int, int]]:
    """Of each of a rank's ``buckets`` of matrices how often it is reduced and gathered in a step.

    ``works``: each with its stage.
    """
    gathered, rounds, found = Gathered(buckets, ahead=overlap), Rounds(buckets, overlap=overlap), bucket_of(buckets)
    for stage, work in works:
        for deed in work.deeds:
            place = found[stage, work.place]
            match deed:
                case "read":
                    gathered.read(place)
                case "add":
                    rounds.add(place)
                case "done":
                    rounds.done(place)
                    rounds.settle()
    rounds.finish()
    yield from zip(rounds.times, gathered.times, strict=True)
