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
