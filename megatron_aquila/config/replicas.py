"""What replicas that compute unequal numbers of samples at once demand: a number for each, and a dp that stays."""

from collections.abc import Iterator

from megatron_aquila.config.elastic import model_ranks
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.errors import Problem


def check_micro_batches(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """There are as many micro-batches as replicas, and always will be."""
    given, layout, ranks = config.train.micro_batch_per_dp, config.parallel, model_ranks(config)
    if not given:
        return
    flag, asked = "--micro-batch-per-dp", spell(given)
    if layout.elastic:
        yield Problem(flag, asked, "an elastic run changes dp, which it fixes", "leave out this, or --elastic")
        return
    dp = layout.data if world is None or world % ranks else world // ranks
    if dp is not None and len(given) != dp:
        way_out = f"give {dp} of them, or start {len(given) * ranks} processes"
        yield Problem(flag, asked, f"it is for {len(given)} replicas, dp is {dp}", way_out)
