"""The batch that parity runs on: random tokens, and masks that leave every sample another number of labels."""

from dataclasses import replace

import numpy as np
import torch

from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.loader import microbatch
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.plan.batches import ReplicaShare
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.train.build import host_batch
from megatron_aquila.verify.shrink import EOD


def sample_batch(
    shape: ModelShape,
    samples: range,
    *,
    seed: int,
    documents: DocumentRules | None = None,
    pieces: tuple[range, ...] | None = None,
) -> Batch:
    """Samples ``samples`` of an endless sequence; the same whoever asks. Sample i is a function of (seed, i).

    A prefix of each sample's labels is masked, of a length that differs from sample to sample: a mean of microbatch
    means then differs from the mean over tokens. Sample i has i % 4 ends of documents, one of them in the middle: with
    ``documents`` they are kept apart as the loader does. ``pieces``: the tokens that are kept, as in ``host_batch``.
    """
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        row = torch.randint(shape.vocab_size, (shape.seq_len + 1,), generator=generator)
        ends = torch.cat((torch.tensor([shape.seq_len // 2]), torch.randperm(shape.seq_len, generator=generator)))
        row[ends[: sample % 4]] = EOD
        rows.append(row)
    source_B = torch.tensor([sample % 2 for sample in samples])
    micro = microbatch(torch.stack(rows).numpy(), source_B.numpy(), documents)
    masked = np.array([(3 * sample) % (shape.seq_len // 2) for sample in samples])[:, None]
    micro.loss_mask_BS[np.arange(shape.seq_len) < masked] = 0
    return host_batch(micro, pieces=pieces)


def rank_batches(
    shape: ModelShape,
    *,
    seed: int,
    global_batch: int,
    share: ReplicaShare,
    documents: DocumentRules | None = None,
    pieces: tuple[range, ...] | None = None,
) -> list[Batch]:
    """One data-parallel rank's microbatches of the global batch, in the order the loader deals them."""
    return [
        replace(
            sample_batch(shape, range(start, start + share.size), seed=seed, documents=documents, pieces=pieces),
            microbatch=number,
        )
        for number, start in enumerate(share.starts(0, global_batch))
    ]
