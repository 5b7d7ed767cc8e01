"""Validation: the loss on held-out samples, with the training engine's forward pass."""

from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.loss import LossMeans, LossSums
from megatron_aquila.train.step import agree, elsewhere_failed, read_batches


def evaluate(machine: Machine, corpus: Corpus) -> LossMeans:
    """Mean loss over the validation samples, also by source. Communicates over every group; changes nothing."""
    assert corpus.valid is not None, "this run has no validation split"
    global_batch = machine.config.train.global_batch
    reads = [read_batches(corpus.valid, start, global_batch) for start in range(0, corpus.valid_samples, global_batch)]
    batches = [batch for found, _ in reads for batch in found]
    failure = next((failure for _, failure in reads if failure is not None), None)
    counts = agree(machine.ctx, batches, failed=failure is not None)
    if counts.failed:
        raise failure if failure is not None else elsewhere_failed()
    sums = LossSums(corpus.valid.source.names, num_tokens=counts.num_tokens, device=machine.ctx.device)
    batches = [batch.to(machine.ctx.device) for batch in batches]
    machine.engine(sums.loss).evaluate(machine.forward_program(len(batches)), sums.weigh(batches))
    return sums.means(machine.ctx)
