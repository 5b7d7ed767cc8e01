"""A schedule run on paper: when each action starts, how long ranks idle, what they hold. The engine without tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_aquila.pipeline.action import Action, Op, Schedule
from megatron_aquila.pipeline.checks import runnable_order


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each action of ``schedule`` starts and ends, in the unit of the costs."""

    schedule: Schedule
    start: Mapping[Action, float]
    end: Mapping[Action, float]

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole pipeline."""
        return 1 + max(action.stage for action in self.start)

    @property
    def origin(self) -> float:
        """When the first action starts."""
        return min(self.start.values())

    @property
    def makespan(self) -> float:
        """Time from the first action to the last of all ranks: a step that ends in a barrier, as clipping does."""
        return max(self.end.values()) - self.origin

    def span(self, rank: int) -> float:
        """Time from ``rank``'s first action to its last: what a step costs it when steps may overlap."""
        program = self.schedule[rank]
        return self.end[program[-1]] - self.start[program[0]]

    def busy(self, rank: int) -> float:
        """Time that ``rank`` works."""
        return sum(self.end[action] - self.start[action] for action in self.schedule[rank])

    @property
    def bubble(self) -> float:
        """Share of all ranks' time up to the barrier that is spent waiting."""
        busy = sum(self.busy(rank) for rank in self.schedule)
        return 1 - busy / (self.makespan * len(self.schedule))

    @property
    def span_bubble(self) -> float:
        """Share of waiting in the own span of the rank that waits most: the bubble if steps may overlap."""
        return max(1 - self.busy(rank) / self.span(rank) for rank in self.schedule)

    def peak_in_flight(self, rank: int) -> int:
        """Most activations, each of one microbatch in one stage, that ``rank`` holds at once; B and W let them go."""
        held = peak = 0
        for action in self.schedule[rank]:
            held += {Op.F: 1, Op.I: 0, Op.B: -1, Op.W: -1}[action.op]
            peak = max(peak, held)
        return peak

    def peak_microbatches(self, rank: int) -> float:
        """``peak_in_flight`` in microbatches of all of ``rank``'s stages together."""
        return self.peak_in_flight(rank) / len({action.stage for action in self.schedule[rank]})


def stage_costs(times: Mapping[Op, float], shares: Sequence[float], *, chunks: int) -> Callable[[Action], float]:
    """Costs for ``simulate``: ``times`` of all ``chunks`` of a rank together, where its stages' ``shares`` are 1.

    ``shares``: how much of the times each stage takes.
    """
    return lambda action: times[action.op] * shares[action.stage] / chunks


def simulate(schedule: Schedule, cost: Callable[[Action], float], hop: float = 0.0) -> Timeline:
    """Run every rank's program as early as its inputs allow.

    ``cost`` is the time of one action, ``hop`` that of one message between ranks (it occupies neither). Raises
    ``ScheduleError`` if the ranks wait for one another.
    """
    rank_of = {action: rank for rank, program in schedule.items() for action in program}
    num_stages = 1 + max(action.stage for action in rank_of)
    clock = dict.fromkeys(schedule, 0.0)
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    for action in runnable_order(schedule, num_stages):
        rank = rank_of[action]
        arrivals = [end[a] + (hop if rank_of[a] != rank else 0.0) for a in action.inputs(num_stages)]
        start[action] = max(clock[rank], *arrivals) if arrivals else clock[rank]
        end[action] = clock[rank] = start[action] + cost(action)
    return Timeline(schedule, start, end)
