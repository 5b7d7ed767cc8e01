"""Sharded gradients and weights (ZeRO-2 and 3): which buckets a rank's work reduces and gathers, how often, and what of
them has memory at once.

The same steps as ``optim.buckets`` and ``optim.gathering`` take with tensors; tests hold them together.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from megatron_aquila.plan.buckets import StageBucket
from megatron_aquila.plan.recompute import RecomputePlan
from megatron_aquila.plan.stages import StagePlan

Pass = tuple[str, int, int]  # F, B, I or W, the stage and the microbatch: what pipeline.action.Action is
Order = Mapping[int, Sequence[Pass]]  # pipeline rank -> its work for a step: what pipeline.action.Schedule is
MOST_WHOLE = 3  # as of optim.gathering; a test holds the two together
LAYER_SIZE = 6  # parameters of a layer: two norms, then its matrices


@dataclass(frozen=True, slots=True)
class Held:
    """How often each bucket was gathered or reduced, and the most elements that had memory at once."""

    times: tuple[int, ...]
    most: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedMatrices:
    """One pipeline rank's matrices in ``buckets``, in the order of the model, and how its work goes through them.

    ``num_pieces`` of a bucket are what a reduction leaves one of on a rank.
    ``keeps_logits``: the head is a linear like others, else it and the loss are one. ``fuse_main_grads``:
    then forward already adds to the head's gradient. ``overlap``: gathered ahead, and reduced beside backward.
    """

    stages: StagePlan
    buckets: Sequence[StageBucket]
    num_pieces: int
    recompute: RecomputePlan
    keeps_logits: bool
    fuse_main_grads: bool
    overlap: bool

    def gathered(self, passes: Iterable[Pass]) -> Held:
        """All-gathers of the step that is ``passes``."""
        bucket_of = self._bucket_of()
        reads = (bucket_of[stage, place] for op, stage, m in passes for place in self._reads(op, stage, m))
        return gathered(reads, [bucket.elements for bucket in self.buckets], ahead=self.overlap)

    def reduced(self, passes: Iterable[Pass]) -> Held:
        """Reductions of the step that is ``passes``. What has memory are whole buckets and the pieces to come."""
        bucket_of, rounds = self._bucket_of(), _Rounds(self.buckets, self.num_pieces, overlap=self.overlap)
        for op, stage, _ in passes:
            for place, touches, is_done in self._gradients(op, stage):
                if touches:
                    rounds.touch(bucket_of[stage, place])
                if is_done:
                    rounds.count(bucket_of[stage, place])
        return rounds.finish()

    def _bucket_of(self) -> dict[tuple[int, int], int]:
        return {(bucket.stage, place): index for index, bucket in enumerate(self.buckets) for place in bucket.places}

    def _reads(self, op: str, stage: int, microbatch: int) -> list[int]:
        """The weights that a pass reads, in order. A recomputed group runs forward again, but for its last matrix."""
        embedding, layers, head = self._places(stage)
        if op == "F":
            return [*embedding, *chain(*layers), *head]
        if op == "W":
            return []
        groups, stop = self.recompute.at(stage, microbatch).groups, sum(self.recompute.at(stage, microbatch).groups)
        reads = [*(head if self.keeps_logits else ()), *reversed([*chain(*layers[stop:])])]
        for size in reversed(groups):
            group = [*chain(*layers[stop - size : stop])]
            reads += [*group[:-1], *reversed(group)]
            stop -= size
        return reads

    def _gradients(self, op: str, stage: int) -> Iterator[tuple[int, bool, bool]]:
        """What a pass adds to: the place, whether something is added now, and whether that is the last of it.

        The embedding is no linear: its gradient is never put off.
        """
        embedding, layers, head = self._places(stage)
        pieces = self.fuse_main_grads and not self.keeps_logits
        if op == "F" and pieces:
            yield from ((place, True, False) for place in head)
        if op in "BW":
            yield from ((place, not pieces, True) for place in head)
            yield from ((place, True, True) for place in reversed([*chain(*layers)]))
        if op in "BI":
            yield from ((place, True, True) for place in embedding)

    def _places(self, stage: int) -> tuple[tuple[int, ...], list[range], tuple[int, ...]]:
        """Where embedding, each layer's matrices and head are among ``plan.buckets.stage_parameters``."""
        first, count = int(self.stages.has_embedding(stage)), len(self.stages.layers[stage])
        starts = [first + LAYER_SIZE * layer for layer in range(count + 1)]
        layers = [range(start + 2, start + LAYER_SIZE) for start in starts[:-1]]
        return (0,) * first, layers, (starts[-1] + 1,) if self.stages.has_head(stage) else ()


def gathered(reads: Iterable[int], sizes: Sequence[int], *, ahead: bool) -> Held:
    """What ``optim.gathering.Gathering`` does with buckets of ``sizes`` that are read in this order."""
    whole, times, last, most = list[int](), [0] * len(sizes), 0, 0

    def hold(place: int) -> None:
        if place in whole:
            whole.remove(place)
        else:
            times[place] += 1
        del whole[: max(0, len(whole) - MOST_WHOLE + 1)]
        whole.append(place)

    for place in reads:
        if whole and whole[-1] == place:
            continue
        following, last = place + (1 if place >= last else -1), place
        hold(place)
        if ahead and 0 <= following < len(sizes):
            hold(following)
        hold(place)
        most = max(most, sum(sizes[one] for one in whole))
    return Held(tuple(times), most)


class _Rounds:
    """What ``optim.buckets.Bucket`` and the optimizer do with sharded gradients."""

    def __init__(self, buckets: Sequence[StageBucket], num_pieces: int, *, overlap: bool) -> None:
        self._buckets, self._num_pieces, self._overlap = buckets, num_pieces, overlap
        self._missing = [len(bucket.places) for bucket in buckets]
        self._there, self._times, self._most = set[int](), [0] * len(buckets), 0
        self._reducing: int | None = None

    def touch(self, bucket: int) -> None:
        """Something is added to a bucket."""
        if self._reducing == bucket:
            self._bring_in()
        self._there.add(bucket)
        self._note()

    def count(self, bucket: int) -> None:
        """A parameter's gradient of a microbatch is complete."""
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0:
            self._missing[bucket] = len(self._buckets[bucket].places)
            if bucket in self._there and self._reducing != bucket:
                self._reduce(bucket)

    def finish(self) -> Held:
        """The end of the step."""
        self._bring_in()
        for bucket in sorted(self._there):
            self._reduce(bucket)
            self._bring_in()
        return Held(tuple(self._times), self._most)

    def _reduce(self, bucket: int) -> None:
        self._bring_in()
        self._times[bucket] += 1
        self._reducing = bucket
        self._note()
        if not self._overlap:
            self._bring_in()

    def _bring_in(self) -> None:
        if self._reducing is not None:
            self._there.remove(self._reducing)
            self._reducing = None

    def _note(self) -> None:
        piece = 0 if self._reducing is None else self._buckets[self._reducing].elements // self._num_pieces
        self._most = max(self._most, sum(self._buckets[one].elements for one in self._there) + piece)
