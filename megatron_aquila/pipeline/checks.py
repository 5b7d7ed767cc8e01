"""Is a schedule complete, in order, and free of deadlock? Asked before the first step, answered without a process."""

from collections import Counter
from collections.abc import Iterable

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op, Schedule

Link = tuple[Op, int, int]  # (what is sent, sending rank, receiving rank)


def check(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    """Raise ``ScheduleError`` unless ``schedule`` trains ``num_microbatches`` through ``num_stages`` and cannot hang.

    A schedule without a single backward is held to the forwards only.
    """
    _check_complete(schedule, num_stages, num_microbatches)
    runnable_order(schedule, num_stages)
    for (op, source, target), (sent, received) in messages(schedule, num_stages).items():
        if sent != received:
            raise ScheduleError(
                f"rank {source} sends to rank {target} in the order {_listed(sent)}, but rank {target} receives in the "
                f"order {_listed(received)}: messages pair up in order, so the {op} tensors would be swapped"
            )


def runnable_order(schedule: Schedule, num_stages: int) -> list[Action]:
    """All actions in an order in which they can run, each after its inputs and each rank's in its own order.

    Raises ``ScheduleError`` showing where each rank stands if the ranks wait for one another for ever.
    """
    done: set[Action] = set()
    order: list[Action] = []
    cursor = dict.fromkeys(schedule, 0)
    total = sum(len(program) for program in schedule.values())
    while len(order) < total:
        before = len(order)
        for rank, program in schedule.items():
            while cursor[rank] < len(program) and done.issuperset(program[cursor[rank]].inputs(num_stages)):
                done.add(program[cursor[rank]])
                order.append(program[cursor[rank]])
                cursor[rank] += 1
        if len(order) == before:
            raise ScheduleError("the ranks wait for one another:\n" + _standing(schedule, cursor, done, num_stages))
    return order


def messages(schedule: Schedule, num_stages: int) -> dict[Link, tuple[list[Action], list[Action]]]:
    """For each link between two ranks: what the one sends and what the other receives, each in its own order.

    A message is named by the action that produced it.
    """
    rank_of = {action: rank for rank, program in schedule.items() for action in program}
    step = {Op.F: 1, Op.B: -1}
    links: dict[Link, tuple[list[Action], list[Action]]] = {}
    for rank, program in schedule.items():
        for action in program:
            op = action.op
            consumer = Action(op, action.stage + step[op], action.microbatch)
            producer = Action(op, action.stage - step[op], action.microbatch)
            if 0 <= consumer.stage < num_stages and rank_of[consumer] != rank:
                links.setdefault((op, rank, rank_of[consumer]), ([], []))[0].append(action)
            if 0 <= producer.stage < num_stages and rank_of[producer] != rank:
                links.setdefault((op, rank_of[producer], rank), ([], []))[1].append(producer)
    return links


def _check_complete(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    given = Counter(action for program in schedule.values() for action in program)
    ops = [Op.F, Op.B] if any(action.op is Op.B for action in given) else [Op.F]
    wanted = {Action(op, s, m) for op in ops for s in range(num_stages) for m in range(num_microbatches)}
    problems = []
    for what, actions in (
        ("missing", wanted - given.keys()),
        ("of no stage or microbatch", given.keys() - wanted),
        ("done more than once", {action for action, count in given.items() if count > 1}),
    ):
        if actions:
            in_order = sorted(actions, key=lambda a: (a.op is Op.B, a.microbatch, a.stage))
            problems.append(f"{what}: {_listed(in_order)}")
    for stage in range(num_stages):
        ranks = sorted(rank for rank, program in schedule.items() if any(a.stage == stage for a in program))
        if len(ranks) > 1:
            problems.append(f"stage {stage} is on ranks {ranks}; its weights are on one")
    if problems:
        size = f"{num_stages} stages and {num_microbatches} microbatches"
        raise ScheduleError(f"the schedule is not one of {size}:\n" + "\n".join(problems))


def _standing(schedule: Schedule, cursor: dict[int, int], done: set[Action], num_stages: int) -> str:
    lines = []
    for rank, program in schedule.items():
        at = cursor[rank]
        if at == len(program):
            lines.append(f"rank {rank} is done")
        else:
            missing = [a for a in program[at].inputs(num_stages) if a not in done]
            lines.append(f"rank {rank} stands at {program[at]} ({at} of {len(program)} done) for {_listed(missing)}")
    return "\n".join(lines)


def _listed(actions: Iterable[Action], most: int = 12) -> str:
    names = [str(action) for action in actions]
    return " ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")
