"""The order of a step's work, and its bubble. Without torch, so that ``aquila config show`` starts at once."""

from collections.abc import Sequence

from megatron_aquila.config.derive import Derived, full_microbatches
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.pipeline.action import Op, Schedule
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.pipeline.simulate import simulate, stage_costs
from megatron_aquila.plan.stages import Bubble, of_mean, stage_flops

TIMES = {Op.F: 1.0, Op.B: 2.0, Op.I: 1.0, Op.W: 1.0}


def run_schedule(config: RunConfig, derived: Derived) -> Schedule:
    """Every pipeline rank's work for a step at the full batch."""
    stages, microbatches = derived.stages, full_microbatches(derived)
    return build_schedule(config.parallel.schedule, stages.num_ranks, microbatches, stages.chunks)


def run_bubble(derived: Derived, order: Schedule) -> Bubble:
    """What ``order`` leaves ranks to wait, where F, B and W take the same time: of stages weighed by their FLOPs, the
    head's included, as ``aquila schedule`` draws them; and of equal ones.
    """
    flops = stage_flops(derived.shape, derived.stages)

    def share(of_stages: Sequence[float]) -> float:
        return simulate(order, stage_costs(TIMES, of_stages, chunks=derived.stages.chunks)).bubble

    return Bubble(own=share(of_mean(flops)), equal=share([1.0] * len(flops)))
