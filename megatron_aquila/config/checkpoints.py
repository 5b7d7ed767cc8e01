"""Rules on what is saved and kept."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_retention(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """What is kept for ever is an exception from what is removed."""
    settings = config.checkpoint
    if settings.keep_every is not None and settings.keep is None:
        why = "no checkpoint is removed that it could keep"
        yield Problem("--keep-every", settings.keep_every, why, "give --keep K with it, or leave it out")


def check_exports(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Checkpoints are what is released."""
    settings = config.checkpoint
    every, interval = settings.export_hf_every, settings.save_interval
    if every is None:
        return
    if settings.save is None:
        yield Problem("--export-hf-every", every, "checkpoints are what is released", "give --save DIR with it")
    if every % interval != 0:
        why = f"no checkpoint is saved at every such step: --save-interval is {interval}"
        yield Problem("--export-hf-every", every, why, f"use a multiple of {interval}")


def check_ephemeral(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Ephemeral checkpoints lie between durable ones, somewhere else."""
    settings = config.checkpoint
    every, folder = settings.ephemeral_save_interval, settings.ephemeral_save_dir
    if every is None:
        if folder is not None:
            why, way_out = "nothing is saved there", "give --ephemeral-save-interval N with it, or leave it out"
            yield Problem("--ephemeral-save-dir", folder, why, way_out)
        return
    if folder is None:
        why, way_out = "each node needs a place for them", "give --ephemeral-save-dir with it, e.g. /dev/shm/aquila"
        yield Problem("--ephemeral-save-interval", every, why, way_out)
    if settings.save is None:
        why, way_out = "they lie between the durable checkpoints of a run", "give --save DIR with it"
        yield Problem("--ephemeral-save-interval", every, why, way_out)
    if every >= settings.save_interval:
        why = f"none would come between two durable ones: --save-interval is {settings.save_interval}"
        way_out = f"use less than {settings.save_interval}"
        yield Problem("--ephemeral-save-interval", every, why, way_out)
