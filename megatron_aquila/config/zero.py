"""What groups that share out optimizer states, gradients and weights demand of the ranks and of other settings."""

from collections.abc import Iterator

from megatron_aquila.config.elastic import model_ranks
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_zero_group(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """The dp x cp ranks are a whole number of groups. Which worlds an elastic run can go on in is its own rule's."""
    layout, ranks = config.parallel, model_ranks(config)
    size, dp = layout.zero_group, layout.data if world is None or world % ranks else world // ranks
    if size is None or dp is None or layout.elastic:
        return
    replicas = dp * layout.context
    if replicas % size:
        below = max(fit for fit in range(1, min(size, replicas) + 1) if replicas % fit == 0)
        above = next((fit for fit in range(size, replicas) if replicas % fit == 0), None)
        near = f"{below}" if above is None else f"{below} or {above}"
        why = f"dp {dp} x cp {layout.context} = {replicas} ranks are no whole number of groups of {size}"
        yield Problem("--zero-group", size, why, f"use {near}, or leave it out to share out over all {replicas}")


def check_reduced_in_groups(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """What groups send within them may be rounded to bf16; a rank that is a group of its own sends nothing so."""
    layout = config.parallel
    if layout.grad_reduce == "bf16" and layout.zero_group == 1 and not layout.deterministic_reduce:
        why = "with --zero-group 1 nothing is reduced within groups, and between them sums travel as they are"
        yield Problem("--grad-reduce", "bf16", why, "use a larger --zero-group, or leave --grad-reduce out")
