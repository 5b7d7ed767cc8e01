"""The global batch as a function of the samples consumed: Megatron-LM's ``start increment samples`` ramp."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The batch of every step of a run.

    ``ramp`` is ``(start, increment, samples)``: the global batch grows from ``start`` to ``global_batch`` in equal
    spans of the first ``samples`` samples. Being a function of ``consumed_samples``, it needs no state of its own.
    """

    global_batch: int
    micro_batch: int
    dp: int
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
        microbatches, rest = divmod(batch, self.micro_batch * self.dp)
        assert rest == 0, f"a batch of {batch} does not divide into {self.micro_batch} x dp {self.dp}"
        return batch, microbatches

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
