"""Pure functions of (ranks, microbatches) to a schedule. A new schedule is one function here and one row in the table.

Stage ``s`` lives on pipeline rank ``s``.
"""

from collections.abc import Callable, Mapping

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op, Schedule


def forward_only(num_ranks: int, num_microbatches: int) -> Schedule:
    """Every forward and no backward: validation."""
    return {rank: [Action(Op.F, rank, m) for m in range(num_microbatches)] for rank in range(num_ranks)}


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards; every rank holds the activations of all microbatches."""
    mbs = range(num_microbatches)
    return {r: [Action(Op.F, r, m) for m in mbs] + [Action(Op.B, r, m) for m in mbs] for r in range(num_ranks)}


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Warm up, then one forward and one backward in turn: rank r holds at most ``num_ranks - r`` microbatches."""
    schedule = {}
    for rank in range(num_ranks):
        warmup = min(num_ranks - rank - 1, num_microbatches)
        forwards = [Action(Op.F, rank, m) for m in range(num_microbatches)]
        backwards = [Action(Op.B, rank, m) for m in range(num_microbatches)]
        steady = [a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair]
        schedule[rank] = forwards[:warmup] + steady + backwards[num_microbatches - warmup :]
    return schedule


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def build_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The training schedule ``name`` for a pipeline of ``num_ranks``. Raises ``ScheduleError`` for an unknown name."""
    assert num_ranks > 0, f"a pipeline needs a rank, got {num_ranks}"
    assert num_microbatches > 0, f"a step needs a microbatch, got {num_microbatches}"
    if name not in SCHEDULES:
        raise ScheduleError(f"--schedule {name}: there is no such schedule; use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_ranks, num_microbatches)
