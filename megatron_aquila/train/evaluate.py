"""Validation: the loss on held-out samples, with the training engine's forward pass."""

from megatron_aquila.train.build import Machine, load_batches
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.loss import LossMeans, LossSums
from megatron_aquila.train.step import agree


def evaluate(machine: Machine, corpus: Corpus) -> LossMeans:
    """Mean loss over the validation samples, also by source. Communicates over every group; changes nothing."""
    assert corpus.valid is not None, "this run has no validation split"
    global_batch = machine.config.train.global_batch
    batches = [
        batch
        for start in range(0, corpus.valid_samples, global_batch)
        for batch in load_batches(corpus.valid, start, global_batch, machine.ctx.device)
    ]
    counts = agree(machine.ctx, batches)
    sums = LossSums(corpus.source_names, num_tokens=counts.num_tokens, device=machine.ctx.device)
    machine.engine(sums.loss).evaluate(machine.forward_program(len(batches)), batches)
    return sums.means(machine.ctx)
