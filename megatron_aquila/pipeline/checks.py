"""Is a schedule complete, in order, and free of deadlock? Asked before the first step, answered without a process."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op, Schedule

Link = tuple[Op, int, int]  # (what is sent, sending rank, receiving rank)
TOWARDS = {Op.F: 1, Op.B: -1, Op.I: -1}  # from the stage that sends to the one that receives; W sends nothing


def check(schedule: Schedule, num_stages: int, num_microbatches: int, *, link_depth: int = 1) -> None:
    """Raise ``ScheduleError`` unless ``schedule`` trains ``num_microbatches`` through ``num_stages`` and cannot hang.

    A schedule without a single backward is held to the forwards only, one with an I or a W to both for all. It must
    also run where a link carries ``link_depth`` messages: an action that sends is done only when the receiver is done
    with the message that many before. At 1 that is more than ``wire.P2PWire`` waits for and, with one stage a rank,
    than NCCL does, whose communicator receives nothing while a send waits in it. Stages in a loop need more: see
    ``needed_link_depth``.
    """
    _check_complete(schedule, num_stages, num_microbatches)
    links = messages(schedule, num_stages)
    for (op, source, target), (sent, received) in links.items():
        if sent != received:
            raise ScheduleError(
                f"rank {source} sends to rank {target} in the order {_listed(sent)}, but rank {target} receives in the "
                f"order {_listed(received)}: messages pair up in order, so the {op} tensors would be swapped"
            )
    runnable_order(schedule, num_stages, also_after=_waits(links, link_depth))


def needed_link_depth(schedule: Schedule, num_stages: int) -> int:
    """The fewest messages that every link must hold for ``schedule`` to run; see ``check``.

    Raises ``ScheduleError`` if it cannot run at any depth.
    """
    runnable_order(schedule, num_stages)
    links = messages(schedule, num_stages)

    def runs(depth: int) -> bool:
        try:
            runnable_order(schedule, num_stages, also_after=_waits(links, depth))
        except ScheduleError:
            return False
        return True

    enough = 1
    while not runs(enough):
        enough *= 2
    return bisect_left(range(1, enough), True, lo=enough // 2, key=runs) + 1


def _waits(links: Mapping[Link, tuple[list[Action], list[Action]]], depth: int) -> dict[Action, Action]:
    """What each sending action waits for where a link holds ``depth`` messages."""
    sent = [sent for sent, _ in links.values()]
    return {later: _receiver(earlier) for one in sent for earlier, later in zip(one, one[depth:], strict=False)}


def runnable_order(
    schedule: Schedule, num_stages: int, *, also_after: Mapping[Action, Action] = MappingProxyType({})
) -> list[Action]:
    """All actions in an order in which they can run, each after its inputs and each rank's in its own order.

    ``also_after`` gives an action one more to wait for. Raises ``ScheduleError`` showing where each rank stands if the
    ranks wait for one another for ever.
    """

    def awaited(action: Action) -> tuple[Action, ...]:
        extra = also_after.get(action)
        return action.inputs(num_stages) if extra is None else (*action.inputs(num_stages), extra)

    done: set[Action] = set()
    order: list[Action] = []
    cursor = dict.fromkeys(schedule, 0)
    total = sum(len(program) for program in schedule.values())
    while len(order) < total:
        before = len(order)
        for rank, program in schedule.items():
            while cursor[rank] < len(program) and done.issuperset(awaited(program[cursor[rank]])):
                done.add(program[cursor[rank]])
                order.append(program[cursor[rank]])
                cursor[rank] += 1
        if len(order) == before:
            raise ScheduleError("the ranks wait for one another:\n" + _standing(schedule, cursor, done, awaited))
    return order


def messages(schedule: Schedule, num_stages: int) -> dict[Link, tuple[list[Action], list[Action]]]:
    """For each link between two ranks: what the one sends and what the other receives, each in its own order.

    A message is named by the action that produced it.
    """
    rank_of = {action: rank for rank, program in schedule.items() for action in program}
    links: dict[Link, tuple[list[Action], list[Action]]] = {}
    for rank, program in schedule.items():
        for action in program:
            op = action.op
            if op not in TOWARDS:
                continue
            consumer = _receiver(action)
            producer = Action(op, action.stage - TOWARDS[op], action.microbatch)
            if 0 <= consumer.stage < num_stages and rank_of[consumer] != rank:
                links.setdefault((op, rank, rank_of[consumer]), ([], []))[0].append(action)
            if 0 <= producer.stage < num_stages and rank_of[producer] != rank:
                links.setdefault((op, rank_of[producer], rank), ([], []))[1].append(producer)
    return links


def _receiver(action: Action) -> Action:
    """What takes the message that ``action`` sends."""
    return Action(action.op, action.stage + TOWARDS[action.op], action.microbatch)


def _check_complete(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    given = Counter(action for program in schedule.values() for action in program)
    used = {action.op for action in given}
    ops = [Op.F, *([Op.I, Op.W] if used & {Op.I, Op.W} else [Op.B] if Op.B in used else [])]
    wanted = {Action(op, s, m) for op in ops for s in range(num_stages) for m in range(num_microbatches)}
    problems = []
    for what, actions in (
        ("missing", wanted - given.keys()),
        ("of no stage or microbatch", given.keys() - wanted),
        ("done more than once", {action for action, count in given.items() if count > 1}),
    ):
        if actions:
            in_order = sorted(actions, key=lambda a: (list(Op).index(a.op), a.microbatch, a.stage))
            problems.append(f"{what}: {_listed(in_order)}")
    ranks_of: dict[int, list[int]] = {}
    for rank, program in sorted(schedule.items()):
        for stage in {action.stage for action in program}:
            ranks_of.setdefault(stage, []).append(rank)
    for stage, ranks in sorted(ranks_of.items()):
        if len(ranks) > 1:
            problems.append(f"stage {stage} is on ranks {ranks}; its weights are on one")
    if problems:
        size = f"{num_stages} stages and {num_microbatches} microbatches"
        raise ScheduleError(f"the schedule is not one of {size}:\n" + "\n".join(problems))


def _standing(
    schedule: Schedule,
    cursor: Mapping[int, int],
    done: set[Action],
    awaited: Callable[[Action], tuple[Action, ...]],
) -> str:
    lines = []
    for rank, program in schedule.items():
        at = cursor[rank]
        if at == len(program):
            lines.append(f"rank {rank} is done")
        else:
            missing = [a for a in awaited(program[at]) if a not in done]
            lines.append(f"rank {rank} stands at {program[at]} ({at} of {len(program)} done) for {_listed(missing)}")
    return "\n".join(lines)


def _listed(actions: Iterable[Action], most: int = 12) -> str:
    names = [str(action) for action in actions]
    return " ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")
