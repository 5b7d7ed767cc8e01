"""Closed forms of pipeline bubbles: what the simulator must reproduce for equal stages."""

from megatron_aquila.plan.stages import ScheduleName


def bubble_time(
    schedule: ScheduleName, *, num_ranks: int, forward: float, backward: float, weight: float, chunks: int = 1
) -> float:
    """Time a rank is idle in one step, in the unit of ``forward``, ``backward`` (input gradient) and ``weight``.

    For equal stages and enough microbatches; the times are those of one microbatch on one rank, all its ``chunks``
    together. GPipe and 1F1B wait until the step's last gradient. The zero-bubble forms are of a rank's own span: a
    global barrier, such as clipping by the global norm, adds to them.
    """
    others = num_ranks - 1
    if schedule == "zb-v":
        return 0.0
    if schedule == "zb-h1":
        return others * (forward + backward - weight)
    return others * (forward + backward + weight) / chunks


def bubble_share(bubble: float, *, num_microbatches: int, stage: float) -> float:
    """Share of a step that is bubble when ``stage`` is the work of one microbatch on one stage, 0 to 1."""
    return bubble / (bubble + num_microbatches * stage)
