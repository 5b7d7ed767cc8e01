"""Validation: the loss on samples that are not trained on, with the training engine's forward pass."""

from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus, Validation
from megatron_aquila.train.loss import LossMeans, LossSums
from megatron_aquila.train.step import agree, elsewhere_failed, read_batches
from megatron_aquila.train.stops import StopRequest


def evaluate(machine: Machine, corpus: Corpus, stops: StopRequest | None = None) -> LossMeans | None:
    """Mean loss over the held-out samples, by source, and over each named set, by its name.

    Without a held-out split ``loss`` is the mean of the named sets'. None, on every rank, where ``stops`` asked any of
    them to stop meanwhile: they agree before each batch. Communicates over every group; changes nothing.
    """
    assert corpus.valid, "this run has nothing to validate on"
    means = {}
    for validation in corpus.valid:
        found = _validate(machine, validation, stops)
        if found is None:
            return None
        means[validation.name] = found
    held_out = means.pop(None, None)
    named = {str(name): found.loss for name, found in means.items()}
    if held_out is None:
        return LossMeans(loss=sum(named.values()) / len(named), by_source=named)
    return LossMeans(loss=held_out.loss, by_source={**held_out.by_source, **named})


def _validate(machine: Machine, validation: Validation, stops: StopRequest | None) -> LossMeans | None:
    """Mean loss over one set of samples, in whole batches of which those beyond the last sample do not count."""
    global_batch, loader = machine.config.train.global_batch, validation.loader
    reads = [read_batches(loader, start, global_batch) for start in range(0, validation.num_samples, global_batch)]
    failure = next((failure for _, failure in reads if failure is not None), None)
    every = [batch for found, _ in reads for batch in found]
    counts = agree(machine.ctx, every, stop_requested=_is_asked(stops), failed=failure is not None)
    if counts.failed:
        raise failure if failure is not None else elsewhere_failed()
    has_z_loss = machine.derived.shape.max_z_loss > 0
    sums = LossSums(loader.source.names, num_tokens=counts.num_tokens, device=machine.ctx.device, has_z_loss=has_z_loss)
    engine = machine.engine(sums.loss)
    for number, (found, _) in enumerate(reads):
        if number > 0:
            counts = agree(machine.ctx, [], stop_requested=_is_asked(stops))
        if counts.stop_requested:
            return None
        batches = [batch.to(machine.ctx.device) for batch in found]
        engine.evaluate(machine.forward_program(len(batches)), sums.weigh(batches))
    return sums.means(machine.ctx)


def _is_asked(stops: StopRequest | None) -> bool:
    return stops is not None and stops.is_asked
