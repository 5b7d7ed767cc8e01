"""Which worlds an elastic run can go on in: the global batch stays, so dp must divide it."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_elastic(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """The world is a whole number of replicas of the model, among which the batches, and shards, divide."""
    if not config.parallel.elastic or world is None:
        return
    fitting = worlds(config)
    if world in fitting or not fitting:  # where no world fits, the batch itself is wrong: another rule says so
        return
    below, above = [size for size in fitting if size < world], [size for size in fitting if size > world]
    nearest = " or ".join(str(size) for size in (*below[-1:], *above[:1]))
    ranks = model_ranks(config)
    if world % ranks:
        why = f"{world} processes are no whole number of replicas of {ranks}"
    elif not _shares_out(config, world // ranks):
        why = f"dp {world // ranks} x cp {config.parallel.context} is no multiple of zero_group"
        why += f" {config.parallel.zero_group}"
    else:
        why = f"dp {world // ranks} x micro_batch {config.train.micro_batch} does not divide the global batch"
        why += f" of {config.train.global_batch}" + (", or its ramp" if config.train.rampup_batch is not None else "")
    yield Problem("--elastic", "", why, f"start {nearest} processes, or another --micro-batch")


def worlds(config: RunConfig) -> list[int]:
    """Every number of processes the run can go on with, ascending."""
    train = config.train
    batches = [train.global_batch, *(() if train.rampup_batch is None else train.rampup_batch[:2])]
    most = train.global_batch // train.micro_batch
    fitting = (dp for dp in range(1, most + 1) if all(size % (train.micro_batch * dp) == 0 for size in batches))
    return [dp * model_ranks(config) for dp in fitting if _shares_out(config, dp)]


def _shares_out(config: RunConfig, dp: int) -> bool:
    """Whether ``dp`` replicas are whole groups of those that share out what ZeRO shards."""
    layout = config.parallel
    return layout.zero_group is None or dp * layout.context % layout.zero_group == 0


def model_ranks(config: RunConfig) -> int:
    """Ranks of one replica of the model."""
    layout = config.parallel
    return layout.tensor * layout.context * layout.pipeline
