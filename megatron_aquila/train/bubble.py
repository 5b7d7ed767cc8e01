"""The order of a step's work, and its bubble. Without torch, so that ``aquila config show`` starts at once."""

from megatron_aquila.config.derive import Derived, full_microbatches
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.pipeline.action import Op, Schedule
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import simulate


def run_schedule(config: RunConfig, derived: Derived) -> Schedule:
    """Every pipeline rank's work for a step at the full batch."""
    stages, microbatches = derived.stages, full_microbatches(derived)
    return build_schedule(config.parallel.schedule, stages.num_ranks, microbatches, stages.chunks)


def run_bubble(config: RunConfig, derived: Derived) -> float:
    """Share of a step at the full batch, up to its barrier, that ranks wait: on equal stages with F = B = W."""
    return simulate(run_schedule(config, derived), lambda action: 2.0 if action.op is Op.B else 1.0).bubble
