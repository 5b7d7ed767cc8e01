"""This rank's microbatches, read ahead by a thread. The only state is how many samples the run has consumed."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.native import lay_out
from megatron_aquila.data.samples import Sample, SampleSource
from megatron_aquila.errors import DataError
from megatron_aquila.plan.batches import ReplicaShare

NO_RULES: Final = DocumentRules(eod=-1, reset_positions=False, reset_attention=False, mask_loss=False)
Ready = TypeVar("Ready")  # what a step takes: a microbatch, made ready for the device


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One microbatch on the host: int64 but for the float32 loss mask. B is the micro-batch size, S the sequence.

    ``document_bounds``: ``DocumentRules.bounds``.
    """

    tokens_BS: NDArray[np.int64]
    labels_BS: NDArray[np.int64]
    loss_mask_BS: NDArray[np.float32]
    positions_BS: NDArray[np.int64]
    source_B: NDArray[np.int64]
    document_bounds: NDArray[np.int32] | None = None


def microbatch(
    samples: Sequence[NDArray[np.int64]] | NDArray[np.int64],
    source_B: NDArray[np.int64],
    documents: DocumentRules | None = None,
) -> MicroBatch:
    """B samples of S + 1 tokens each, int64, made ready for the model."""
    rules = NO_RULES if documents is None else documents
    tokens_BS, labels_BS, loss_mask_BS, positions_BS, bounds = lay_out(
        np.ascontiguousarray(samples),
        eod=rules.eod,
        reset_positions=rules.reset_positions,
        reset_attention=rules.reset_attention,
        mask_loss=rules.mask_loss,
    )
    return MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        loss_mask_BS=loss_mask_BS,
        positions_BS=positions_BS,
        source_B=source_B,
        document_bounds=bounds,
    )


class BatchLoader(Generic[Ready]):
    """Microbatches of one data-parallel rank, in Megatron-LM's order; every rank reads for itself.

    Microbatch j of a global batch that starts at sample c takes ``share.size`` samples from
    ``c + j * share.round_size + share.first`` on. No communication.

    Args:
        source: the samples.
        share: which of a global batch's samples are this rank's, and how many at once.
        vocab_size: ids from here on are an error of the data.
        prepare: what a step takes, from a microbatch and its number in the step; called by the thread that reads ahead.
        batch_at: the global batch of the step that starts at so many consumed samples; ``None``: nothing is read ahead.
        prefetch: steps read ahead.
        documents: what is kept apart at the end of a document; ``None``: nothing.
        num_counted: samples whose labels count, so that a last batch may be filled up; ``None``: all, and none is
            added.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        share: ReplicaShare,
        vocab_size: int,
        prepare: Callable[[MicroBatch, int], Ready],
        batch_at: Callable[[int], int] | None = None,
        prefetch: int = 0,
        documents: DocumentRules | None = None,
        num_counted: int | None = None,
    ) -> None:
        self.source, self._num_counted = source, num_counted
        self.share, self.vocab_size = share, vocab_size
        self._batch_at, self._prefetch, self._documents, self._prepare = batch_at, prefetch, documents, prepare
        self._left_out: tuple[tuple[int, int], ...] = ()
        self._blank = Sample(np.zeros(0, dtype=np.int64), 0)  # what stands for a sample that is left out
        self._ahead: dict[tuple[int, int], Future[list[Ready]]] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")

    def fetch(self, consumed_samples: int, global_batch: int) -> list[Ready]:
        """This rank's microbatches of the step, then start reading the next steps.

        Raises:
            DataError: the data ends before the batch does, or a token is outside the vocabulary.
        """
        step = (consumed_samples, global_batch)
        ready = self._ahead.pop(step, None)
        batches = self._read(*step) if ready is None else ready.result()
        self._read_ahead(consumed_samples + global_batch)
        return batches

    def leave_out(self, ranges: Sequence[tuple[int, int]], *, seq_len: int) -> None:
        """From here on read no sample of these half-open ranges: tokens 0 without a label stand in its place.

        So all other samples stay where they are: sample i of a run does not depend on what is left out.
        """
        for ahead in self._ahead.values():
            ahead.cancel()
        self._ahead, self._left_out = {}, tuple(ranges)
        self._blank = Sample(np.zeros(seq_len + 1, dtype=np.int64), 0)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, consumed_samples: int) -> None:
        """Keep the next steps, and only those, under way."""
        wanted: dict[tuple[int, int], Future[list[Ready]]] = {}
        while self._batch_at is not None and len(wanted) < self._prefetch:
            step = (consumed_samples, self._batch_at(consumed_samples))
            consumed_samples += step[1]
            if consumed_samples > len(self.source):
                break
            wanted[step] = self._ahead.pop(step) if step in self._ahead else self._reader.submit(self._read, *step)
        for stale in self._ahead.values():
            stale.cancel()
        self._ahead = wanted

    def _read(self, consumed_samples: int, global_batch: int) -> list[Ready]:
        if self._num_counted is None and consumed_samples + global_batch > len(self.source):
            raise DataError(
                f"{', '.join(self.source.names)}: samples {consumed_samples} to {consumed_samples + global_batch} "
                f"wanted, but the run's data has {len(self.source)}; raise --train-samples"
            )
        starts = self.share.starts(consumed_samples, global_batch)
        return [self._prepare(self._microbatch(start), number) for number, start in enumerate(starts)]

    def _microbatch(self, start: int) -> MicroBatch:
        left_out = [self._is_left_out(number) for number in range(start, start + self.share.size)]
        samples = [self._blank if blank else self._sample(number) for number, blank in enumerate(left_out, start=start)]
        tokens = np.stack([sample.tokens for sample in samples])
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            self._refuse(samples, start)
        batch = microbatch(tokens, np.array([sample.source for sample in samples], dtype=np.int64), self._documents)
        batch.loss_mask_BS[left_out] = 0
        for labels, sample in zip(batch.loss_mask_BS, samples, strict=True):
            labels[len(labels) - sample.padding :] = 0
        if self._num_counted is not None:
            batch.loss_mask_BS[max(self._num_counted - start, 0) :] = 0
        return batch

    def _is_left_out(self, number: int) -> bool:
        return any(start <= number < stop for start, stop in self._left_out)

    def _sample(self, number: int) -> Sample:
        return self.source[min(number, len(self.source) - 1)]

    def _refuse(self, samples: Sequence[Sample], start: int) -> None:
        for number, sample in enumerate(samples, start=start):
            wrong = sample.tokens[(sample.tokens < 0) | (sample.tokens >= self.vocab_size)]
            if len(wrong) > 0:
                raise DataError(
                    f"{self.source.names[sample.source]}: token {wrong[0]} in sample {number} is outside the "
                    f"vocabulary of {self.vocab_size}; the data is of another tokenizer, or --vocab-size is wrong"
                )
