"""Pure functions of (ranks, microbatches, chunks) to a schedule. A new schedule is one function here and one table row.

A rank holds ``chunks`` stages, placed as ``plan.stages.stage_ranks`` says: in a loop, for ZB-V on a V.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op, Program, Schedule
from megatron_aquila.plan.stages import FIXED_CHUNKS, stage_ranks


def forward_only(stage_rank: Sequence[int], num_microbatches: int) -> Schedule:
    """Every forward and no backward: validation, wherever the stages are.

    Of what a rank could do it does what is furthest along the model, so that little waits between the stages.
    """
    schedule: dict[int, list[Action]] = {rank: [] for rank in sorted(set(stage_rank))}
    done = [0] * len(stage_rank)  # microbatches that each stage has seen
    while done[-1] < num_microbatches:
        ready = [given > taken for given, taken in pairwise([num_microbatches, *done])]
        furthest = {rank: stage for stage, rank in enumerate(stage_rank) if ready[stage]}
        for rank, stage in furthest.items():
            schedule[rank].append(Action(Op.F, stage, done[stage]))
            done[stage] += 1
    return schedule


def gpipe(num_ranks: int, num_microbatches: int, chunks: int) -> Schedule:
    """All forwards, then all backwards, which go the same way in a mirror; a rank holds all microbatches."""
    stage_rank = stage_ranks("gpipe", num_ranks, chunks)
    last = len(stage_rank) - 1
    forwards, mirrored = (forward_only(ranks, num_microbatches) for ranks in (stage_rank, stage_rank[::-1]))
    return {
        rank: [*program, *(Action(Op.B, last - action.stage, action.microbatch) for action in mirrored[rank])]
        for rank, program in forwards.items()
    }


def one_f_one_b(num_ranks: int, num_microbatches: int, chunks: int) -> Schedule:
    """Warm up, then one forward and one backward in turn; interleaved where a rank has several chunks.

    One chunk: rank r holds at most ``num_ranks - r`` microbatches. Several: the microbatches go through all chunks in
    rounds of ``num_ranks``, which divides the bubble by ``chunks``. Where they do not come out in such rounds, rounds
    are longer and hold more: any number of microbatches runs, as a batch ramp needs.
    """
    schedule = {}
    total = num_microbatches * chunks
    rounds = _rounds(num_ranks, num_microbatches)
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * chunks, num_ranks)
        forwards = [Action(Op.F, stage, m) for mbs in rounds for stage in stages for m in mbs]
        backwards = [Action(Op.B, stage, m) for mbs in rounds for stage in reversed(stages) for m in mbs]
        behind = num_ranks - rank - 1
        warmup = min(behind if chunks == 1 else 2 * behind + (chunks - 1) * len(rounds[0]), total)
        steady = [a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair]
        schedule[rank] = forwards[:warmup] + steady + backwards[total - warmup :]
    return schedule


def _rounds(num_ranks: int, num_microbatches: int) -> list[range]:
    """As many rounds as have a microbatch for every rank, the spare microbatches spread over the first."""
    count = max(1, num_microbatches // num_ranks)
    each, extra = divmod(num_microbatches, count)
    firsts = [index * each + min(index, extra) for index in range(count + 1)]
    return [range(first, last) for first, last in pairwise(firsts)]


def zero_bubble_h1(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """ZB-H1: 1F1B whose weight gradients wait for where the bubble was; at most ``num_ranks`` microbatches a rank.

    Rank r owes up to r weight gradients: exactly the microbatches that 1F1B lets rank 0 hold more than it.
    """
    schedule = {}
    for rank, program in one_f_one_b(num_ranks, num_microbatches, chunks).items():
        out: list[Action] = []
        owed: list[Action] = []
        for action in program:
            if action.op is Op.F:
                out.append(action)
                continue
            out.append(Action(Op.I, action.stage, action.microbatch))
            owed.append(Action(Op.W, action.stage, action.microbatch))
            if len(owed) > rank:
                out.append(owed.pop(0))
        schedule[rank] = out + owed
    return schedule


def zero_bubble_v(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Schedule:
    """ZB-V: two chunks a rank on a V, so that a rank's last chunk starts backward soon after its first.

    No bubble in a rank's own span where F = B = W and there are 2p - 1 microbatches; with fewer, the schedule of 2p - 1
    without those that do not exist.
    """
    assert chunks == 2, f"a V has two legs, got {chunks} chunks"
    return {rank: _v_program(rank, num_ranks, num_microbatches) for rank in range(num_ranks)}


def _v_program(rank: int, num_ranks: int, num_microbatches: int) -> Program:
    down, up = rank, 2 * num_ranks - 1 - rank  # the rank's stage on either leg
    behind, total = num_ranks - rank, max(num_microbatches, 2 * num_ranks - 1)
    program: list[Action] = []
    done: Counter[tuple[int, Op]] = Counter()

    def add(stage: int, *ops: Op, times: int = 1) -> None:
        for op in ops * times:
            program.append(Action(op, stage, done[stage, op]))
            done[stage, op] += 1

    add(down, Op.F, times=2 * behind - 1)
    for _ in range(rank):
        add(up, Op.F)
        add(down, Op.F)
    add(up, Op.F, Op.I, Op.W, times=behind)
    while done[up, Op.F] < total:
        if done[down, Op.F] < total:
            add(down, Op.F)
        add(down, Op.I, Op.W)
        add(up, Op.F, Op.I, Op.W)
    for _ in range(rank):
        add(down, Op.I)
        add(up, Op.I)
    add(down, Op.I, Op.W, times=behind)
    for stage in (up, down):
        add(stage, Op.W, times=total - done[stage, Op.W])
    return [action for action in program if action.microbatch < num_microbatches]


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zero_bubble_h1,
    "zb-v": zero_bubble_v,
}


def default_chunks(name: str) -> int:
    """Stages a rank that schedule ``name`` has unless told otherwise."""
    return FIXED_CHUNKS.get(name, 1)


def build_schedule(name: str, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> Schedule:
    """The training schedule ``name`` for a pipeline of ``num_ranks`` ranks with ``chunks`` stages each.

    ``chunks`` is by default what the schedule needs: 2 for ZB-V, else 1. Raises ``ScheduleError`` for an unknown name
    or a number of chunks that the schedule does not have.
    """
    assert num_ranks > 0, f"a pipeline needs a rank, got {num_ranks}"
    assert num_microbatches > 0, f"a step needs a microbatch, got {num_microbatches}"
    if name not in SCHEDULES:
        raise ScheduleError(f"--schedule {name}: there is no such schedule; use one of {', '.join(SCHEDULES)}")
    chunks = default_chunks(name) if chunks is None else chunks
    if chunks != FIXED_CHUNKS.get(name, chunks):
        way_out = f"use --chunks {FIXED_CHUNKS[name]}, or --schedule 1f1b, which takes any number"
        raise ScheduleError(f"--chunks {chunks}: --schedule {name} has {FIXED_CHUNKS[name]} a rank; {way_out}")
    assert chunks > 0, f"a rank needs a chunk of the model, got {chunks}"
    return SCHEDULES[name](num_ranks, num_microbatches, chunks)
