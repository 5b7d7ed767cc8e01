"""The batch that parity runs on: random tokens, and masks that leave every sample another number of labels."""

import torch

from megatron_aquila.parallel.batch import Batch
from megatron_aquila.plan.shape import ModelShape


def sample_batch(shape: ModelShape, samples: range, *, seed: int) -> Batch:
    """Samples ``samples`` of an endless sequence; the same whoever asks. Sample i is a function of (seed, i).

    A prefix of each sample's labels is masked, of a length that differs from sample to sample: a mean of microbatch
    means then differs from the mean over tokens.
    """
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        rows.append(torch.randint(shape.vocab_size, (shape.seq_len + 1,), generator=generator))
    tokens = torch.stack(rows)
    position = torch.arange(shape.seq_len).expand(len(samples), -1)
    masked = torch.tensor([(3 * sample) % (shape.seq_len // 2) for sample in samples])[:, None]
    return Batch(
        tokens_BS=tokens[:, :-1].contiguous(),
        labels_BS=tokens[:, 1:].contiguous(),
        loss_mask_BS=(position >= masked).float(),
        positions_BS=position.contiguous(),
        source_B=torch.tensor([sample % 2 for sample in samples]),
    )


def rank_batches(
    shape: ModelShape, *, seed: int, global_batch: int, micro_batch: int, dp: int, dp_rank: int
) -> list[Batch]:
    """One data-parallel rank's microbatches of the global batch, in the order the loader deals them."""
    step = micro_batch * dp
    starts = range(dp_rank * micro_batch, global_batch, step)
    return [sample_batch(shape, range(start, start + micro_batch), seed=seed) for start in starts]
