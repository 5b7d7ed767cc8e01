"""Validation: the loss on samples that are not trained on, with the training engine's forward pass."""

from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus, Validation
from megatron_aquila.train.loss import LossMeans, LossSums
from megatron_aquila.train.step import agree, elsewhere_failed, read_batches


def evaluate(machine: Machine, corpus: Corpus) -> LossMeans:
    """Mean loss over the held-out samples, by source, and over each named set, by its name.

    Without a held-out split ``loss`` is the mean of the named sets'. Communicates over every group; changes nothing.
    """
    assert corpus.valid, "this run has nothing to validate on"
    means = {validation.name: _validate(machine, validation) for validation in corpus.valid}
    held_out = means.pop(None, None)
    named = {str(name): found.loss for name, found in means.items()}
    if held_out is None:
        return LossMeans(loss=sum(named.values()) / len(named), by_source=named)
    return LossMeans(loss=held_out.loss, by_source={**held_out.by_source, **named})


def _validate(machine: Machine, validation: Validation) -> LossMeans:
    """Mean loss over one set of samples, in whole batches of which those beyond the last sample do not count."""
    global_batch, loader = machine.config.train.global_batch, validation.loader
    starts = range(0, validation.num_samples, global_batch)
    reads = [read_batches(loader, start, global_batch) for start in starts]
    batches = [batch for found, _ in reads for batch in found]
    failure = next((failure for _, failure in reads if failure is not None), None)
    counts = agree(machine.ctx, batches, failed=failure is not None)
    if counts.failed:
        raise failure if failure is not None else elsewhere_failed()
    has_z_loss = machine.derived.shape.max_z_loss > 0
    sums = LossSums(loader.source.names, num_tokens=counts.num_tokens, device=machine.ctx.device, has_z_loss=has_z_loss)
    batches = [batch.to(machine.ctx.device) for batch in batches]
    machine.engine(sums.loss).evaluate(machine.forward_program(len(batches)), sums.weigh(batches))
    return sums.means(machine.ctx)
