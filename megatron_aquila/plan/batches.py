"""The global batch as a function of the samples consumed: Megatron-LM's ``start increment samples`` ramp.

And its samples as they are dealt to the replicas, in their order, in rounds: a microbatch of each replica.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

Batches: TypeAlias = tuple[tuple[int, int, int], ...]  # (steps before, samples before, samples of each step from there)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaShare:
    """A replica's part of a global batch: of every ``round_size`` samples ``size`` in a row, the first at ``first``.

    The default is all of it, a sample at once.
    """

    size: int = 1
    first: int = 0
    round_size: int = 1

    def starts(self, consumed_samples: int, global_batch: int) -> range:
        """The first sample of each of the replica's microbatches, in a batch that starts at ``consumed_samples``."""
        assert global_batch % self.round_size == 0, f"a batch of {global_batch} does not divide by {self.round_size}"
        return range(consumed_samples + self.first, consumed_samples + self.first + global_batch, self.round_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The batch of every step of a run.

    ``micro_batches`` are the samples that each replica computes at once; all have as many microbatches. ``ramp`` is
    ``(start, increment, samples)``: the global batch grows from ``start`` to ``global_batch`` in equal spans of the
    first ``samples`` samples. Being a function of ``consumed_samples``, it needs no state of its own.
    """

    global_batch: int
    micro_batches: tuple[int, ...]
    ramp: tuple[int, int, int] | None = None

    def global_batch_at(self, consumed_samples: int) -> int:
        """Samples of the step that starts when ``consumed_samples`` have been consumed."""
        if self.ramp is None:
            return self.global_batch
        start, increment, samples = self.ramp
        num_increments = (self.global_batch - start) // increment
        if num_increments == 0 or samples == 0 or consumed_samples > samples:
            return self.global_batch
        # Megatron-LM's own expression, floating point included, so that the same run takes the same steps.
        steps = int(consumed_samples / (samples / num_increments))
        return start + steps * increment

    def batch_at(self, consumed_samples: int) -> tuple[int, int]:
        """``(global batch, microbatches of a rank)`` of the step that starts there."""
        batch = self.global_batch_at(consumed_samples)
        return batch, self.num_microbatches(batch)

    def num_microbatches(self, global_batch: int) -> int:
        """Microbatches of every rank in a step of ``global_batch`` samples."""
        microbatches, rest = divmod(global_batch, sum(self.micro_batches))
        assert rest == 0, f"a batch of {global_batch} does not divide into rounds of {self.micro_batches} samples"
        return microbatches

    def micro_batch_of(self, dp_rank: int) -> int:
        """Samples that the replica ``dp_rank`` computes at once."""
        return self.micro_batches[dp_rank]

    def share_of(self, dp_rank: int) -> ReplicaShare:
        """The samples of the replica ``dp_rank``."""
        return ReplicaShare(
            size=self.micro_batch_of(dp_rank),
            first=sum(self.micro_batches[:dp_rank]),
            round_size=sum(self.micro_batches),
        )

    def batches_from(self, step: int, consumed_samples: int) -> Iterator[tuple[int, int, int]]:
        """``Batches`` from the step before which ``step`` others took ``consumed_samples``; the last is for ever."""
        size = 0
        while size != self.global_batch:
            if self.global_batch_at(consumed_samples) != size:
                size = self.global_batch_at(consumed_samples)
                yield step, consumed_samples, size
            step, consumed_samples = step + 1, consumed_samples + size

    def end_of_run(self, consumed_samples: int, target: int) -> int:
        """Samples consumed when at least ``target`` are, in whole batches, starting from ``consumed_samples``."""
        while consumed_samples < target and self.global_batch_at(consumed_samples) < self.global_batch:
            consumed_samples += self.global_batch_at(consumed_samples)
        steps = max(0, -(-(target - consumed_samples) // self.global_batch))
        return consumed_samples + steps * self.global_batch

    def num_steps(self, target: int) -> int:
        """Steps until at least ``target`` samples are consumed, from the first."""
        steps = consumed_samples = 0
        while consumed_samples < target and self.global_batch_at(consumed_samples) < self.global_batch:
            consumed_samples += self.global_batch_at(consumed_samples)
            steps += 1
        return steps + max(0, -(-(target - consumed_samples) // self.global_batch))

    def sizes(self) -> tuple[int, ...]:
        """Every global batch the run passes through, ascending."""
        if self.ramp is None:
            return (self.global_batch,)
        start, increment, _ = self.ramp
        return (*range(start, self.global_batch, increment), self.global_batch)
