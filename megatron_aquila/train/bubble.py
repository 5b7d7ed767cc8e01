"""The bubble of a run. Without torch, so that ``aquila config show`` starts at once."""

from megatron_aquila.config.derive import Derived, full_microbatches
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.pipeline.action import Op
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import simulate


def run_bubble(config: RunConfig, derived: Derived) -> float:
    """Share of a step at the full batch, up to its barrier, that ranks wait: on equal stages with F = B = W."""
    stages, microbatches = derived.stages, full_microbatches(derived)
    schedule = build_schedule(config.parallel.schedule, stages.num_ranks, microbatches, stages.chunks)
    return simulate(schedule, lambda action: 2.0 if action.op is Op.B else 1.0).bubble
