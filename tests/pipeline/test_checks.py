"""Schedules that must be refused, and what the message shows."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op, Schedule
from megatron_aquila.pipeline.checks import check, messages, needed_link_depth, runnable_order
from megatron_aquila.pipeline.schedules import SCHEDULES, build_schedule, default_chunks, forward_only
from megatron_aquila.plan.stages import stage_ranks


def parse(*rows: str) -> Schedule:
    """``parse("0F0 0B0", "1F0 1B0")``: a schedule in torch's notation, one row a rank (one-digit numbers)."""
    return {r: [Action(Op(a[1]), int(a[0]), int(a[2])) for a in row.split()] for r, row in enumerate(rows)}


@pytest.mark.parametrize(
    ("rows", "stages", "microbatches", "message"),
    [
        (["0F0 0B0", "1F0"], 2, 1, "missing: 1B0"),
        (["0F0 0B0", "1F0 1B0"], 2, 2, "missing: 0F1 1F1 0B1 1B1"),
        (["0F0 0B0"], 2, 1, "missing: 1F0 1B0"),
        (["0F0 0F0 0B0"], 1, 1, "done more than once: 0F0"),
        (["0F0 0B0 0B1"], 1, 1, "of no stage or microbatch: 0B1"),
        (["0F0 0F1 0B0", "0B1"], 1, 2, r"stage 0 is on ranks \[0, 1\]"),
        (["0F0 0I0"], 1, 1, "missing: 0W0"),
        (["0F0 0W0"], 1, 1, "missing: 0I0"),
        (["0F0 0B0", "1F0 1I0 1W0"], 2, 1, "missing: 0I0 0W0\nof no stage or microbatch: 0B0"),
    ],
)
def test_incomplete_schedules_are_refused(rows: list[str], stages: int, microbatches: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(parse(*rows), stages, microbatches)


def test_out_of_order_is_refused_and_shows_where_each_rank_stands() -> None:
    with pytest.raises(ScheduleError) as error:
        check(parse("0F0 0B0", "1B0 1F0"), 2, 1)
    assert str(error.value).splitlines() == [
        "the ranks wait for one another:",
        "rank 0 stands at 0B0 (1 of 2 done) for 1B0",
        "rank 1 stands at 1B0 (0 of 2 done) for 1F0",
    ]


def test_deadlock_is_refused_and_shows_where_each_rank_stands() -> None:
    """Rank 1 wants microbatch 1 before it gives back 0; rank 0 wants 0 back before it sends 1. Rank 2 is done."""
    schedule = parse("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1", "2F0")
    with pytest.raises(ScheduleError) as error:
        runnable_order(schedule, 3)
    assert str(error.value).splitlines()[1:] == [
        "rank 0 stands at 0B0 (1 of 4 done) for 1B0",
        "rank 1 stands at 1F1 (1 of 4 done) for 0F1",
        "rank 2 is done",
    ]


def test_messages_that_cross_are_refused() -> None:
    """It can run, but without tags rank 1 would compute microbatch 1 with the activations of microbatch 0."""
    with pytest.raises(ScheduleError, match=r"in the order 0F0 0F1, but rank 1 receives in the order 0F1 0F0"):
        check(parse("0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1"), 2, 2)


def test_a_schedule_that_piles_up_messages_is_refused() -> None:
    """Rank 0 sends all activations before it takes a gradient, rank 1 gives one back after each.

    It can run only if any number of messages fit between them.
    """
    rows = "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"
    runnable_order(parse(*rows), 2)
    with pytest.raises(ScheduleError) as error:
        check(parse(*rows), 2, 4)
    assert str(error.value).splitlines()[1:] == [
        "rank 0 stands at 0F3 (3 of 8 done) for 1F2",
        "rank 1 stands at 1B1 (3 of 8 done) for 0B0",
    ]


def test_a_weight_gradient_waits_for_its_input_gradient() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0 stands at 0W0 \(1 of 3 done\) for 0I0"):
        check(parse("0F0 0W0 0I0"), 1, 1)


@pytest.mark.parametrize("name", SCHEDULES)
@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 24))
def test_ours_pass(name: str, ranks: int, microbatches: int) -> None:
    check(build_schedule(name, ranks, microbatches), ranks * default_chunks(name), microbatches)


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("1f1b", 2), ("1f1b", 4), ("zb-v", 2)])
@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 24))
def test_forwards_alone_need_links_of_two_where_stages_turn_back(
    name: str, chunks: int, ranks: int, microbatches: int
) -> None:
    stage_rank = stage_ranks(name, ranks, chunks)
    turns_back = any(after < before for before, after in pairwise(stage_rank))
    check(forward_only(stage_rank, microbatches), ranks * chunks, microbatches, link_depth=2 if turns_back else 1)


def test_stages_in_a_loop_need_links_that_hold_more() -> None:
    """Every rank of a loop would wait to send to the next, which waits to send on."""
    interleaved, gpipe = (build_schedule(name, 4, 32, 5) for name in ("1f1b", "gpipe"))
    with pytest.raises(ScheduleError, match="wait for one another"):
        check(interleaved, 20, 32)
    check(interleaved, 20, 32, link_depth=2)
    assert (needed_link_depth(interleaved, 20), needed_link_depth(gpipe, 20)) == (2, 2)
    assert needed_link_depth(build_schedule("zb-v", 4, 32), 8) == 1
    with pytest.raises(ScheduleError, match="wait for one another"):
        needed_link_depth(parse("0F0 0B0", "1B0 1F0"), 2)


@given(ranks=st.integers(1, 7), microbatches=st.integers(1, 24), chunks=st.integers(2, 5))
def test_interleaved_needs_two_messages_a_link_and_one_for_each_that_its_rounds_are_longer(
    ranks: int, microbatches: int, chunks: int
) -> None:
    longest_round = -(-microbatches // max(1, microbatches // ranks))
    depth = max(2, 1 + longest_round - ranks)
    check(build_schedule("1f1b", ranks, microbatches, chunks), ranks * chunks, microbatches, link_depth=depth)


def test_long_lists_are_cut() -> None:
    with pytest.raises(ScheduleError, match=r"0F1 0F2 .* \.\.\. \(198 in all\)"):
        check(parse("0F0 0B0"), 1, 100)


@pytest.mark.parametrize("name", SCHEDULES)
@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 24))
def test_wire_order_is_equal_on_both_ends(name: str, ranks: int, microbatches: int) -> None:
    links = messages(build_schedule(name, ranks, microbatches), ranks * default_chunks(name))
    back = Op.I if name.startswith("zb") else Op.B
    pairs = [pair for r in range(ranks - 1) for pair in ((Op.F, r, r + 1), (back, r + 1, r))]
    if name == "zb-v":  # the other leg goes the other way
        pairs += [(op, target, source) for op, source, target in pairs]
    assert set(links) == set(pairs)
    for sent, received in links.values():
        assert sent == received
        assert len(sent) == microbatches


def runs_with_rendezvous(schedule: Schedule, num_stages: int, *, shared: bool = False) -> bool:
    """Does it run where a send ends only when it is received and a communicator works strictly in order, as NCCL?

    A message stands in the queue of both its ranks and runs when it is at the head of both and was computed. Each link
    has a communicator; ``shared``: all links for activations have one, all for gradients another.
    """
    home = {a: rank for rank, program in schedule.items() for a in program}
    step = {Op.F: 1, Op.B: -1, Op.I: -1, Op.W: num_stages}  # W sends to nobody

    def communicator(message: Action) -> tuple[object, ...]:
        target = Action(message.op, message.stage + step[message.op], message.microbatch)
        return (message.op,) if shared else (message.op, home[message], home[target])

    queues: dict[tuple[int, object], list[Action]] = {}
    for rank, program in schedule.items():
        queues[rank, "compute"] = list(program)
        for a in program:
            for message in (Action(a.op, a.stage - step[a.op], a.microbatch), a):  # receive, then send
                target = Action(a.op, message.stage + step[a.op], a.microbatch)
                if message in home and target in home and home[message] != home[target]:
                    queues.setdefault((rank, communicator(message)), []).append(message)
    computed: set[Action] = set()
    arrived: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for (rank, kind), queue in queues.items():
            if not queue:
                continue
            head = queue[0]
            if kind == "compute":
                if all(i in (computed if home[i] == rank else arrived) for i in head.inputs(num_stages)):
                    computed.add(queue.pop(0))
                    moved = True
            elif head in computed and home[head] == rank:
                other = queues[home[Action(head.op, head.stage + step[head.op], head.microbatch)], kind]
                if other[:1] == [head]:
                    arrived.add(other.pop(0))
                    queue.pop(0)
                    moved = True
    return not any(queues.values())


@pytest.mark.parametrize(
    ("name", "chunks"), [("gpipe", 1), ("gpipe", 3), ("1f1b", 1), ("1f1b", 2), ("zb-h1", 1), ("zb-v", 2)]
)
@given(ranks=st.integers(1, 6), microbatches=st.integers(1, 12))
def test_no_deadlock_where_sends_wait_for_their_receivers(
    name: str, chunks: int, ranks: int, microbatches: int
) -> None:
    schedule = build_schedule(name, ranks, microbatches, chunks)
    assert runs_with_rendezvous(schedule, ranks * chunks)
    assert chunks > 1 or runs_with_rendezvous(schedule, ranks, shared=True)


@pytest.mark.parametrize(("name", "ranks"), [("zb-v", 4), ("1f1b", 2)])
def test_links_that_shared_a_communicator_would_hang(name: str, ranks: int) -> None:
    """On a V, and in a loop of two, activations go both ways between the same ranks."""
    assert not runs_with_rendezvous(build_schedule(name, ranks, 8, 2), 2 * ranks, shared=True)


def test_the_rendezvous_model_can_say_no() -> None:
    assert not runs_with_rendezvous(parse("0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1"), 2)
