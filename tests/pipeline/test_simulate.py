"""The simulator against the closed forms."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.schedules import build_schedule, forward_only
from megatron_aquila.pipeline.simulate import Timeline, simulate
from tests.pipeline.closed_forms import bubble_share, bubble_time

EXACT = 1e-9
times = st.floats(0.1, 10.0)


def run(name: str, ranks: int, microbatches: int, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    costs = {Op.F: forward, Op.B: backward}
    return simulate(build_schedule(name, ranks, microbatches), lambda action: costs[action.op])


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(ranks=st.integers(1, 8), microbatches=st.integers(1, 24), forward=times, backward=times)
def test_bubble_equals_the_closed_form(
    name: str, ranks: int, microbatches: int, forward: float, backward: float
) -> None:
    """(p - 1)(F + B) of waiting on every rank, for GPipe and 1F1B, also with fewer microbatches than ranks."""
    timeline = run(name, ranks, microbatches, forward, backward)
    work = microbatches * (forward + backward)
    assert timeline.makespan == pytest.approx((microbatches + ranks - 1) * (forward + backward), rel=EXACT)
    assert timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1), abs=EXACT)
    for rank in range(ranks):
        assert timeline.busy(rank) == pytest.approx(work, rel=EXACT)
        assert timeline.makespan - timeline.busy(rank) == pytest.approx(
            (ranks - 1) * (forward + backward), rel=EXACT, abs=EXACT
        )
        # a rank begins `rank` forwards late and ends `rank` backwards early
        expected = (microbatches + ranks - 1 - rank) * (forward + backward)
        assert timeline.span(rank) == pytest.approx(expected, rel=EXACT)


def test_the_number_of_the_34b_recipe() -> None:
    assert run("1f1b", 4, 32).bubble == pytest.approx(0.0857, abs=5e-5)  # p 4, m 32


@given(ranks=st.integers(1, 8), microbatches=st.integers(1, 24))
def test_peak_in_flight(ranks: int, microbatches: int) -> None:
    one_f_one_b, gpipe = run("1f1b", ranks, microbatches), run("gpipe", ranks, microbatches)
    for rank in range(ranks):
        assert one_f_one_b.peak_in_flight(rank) == min(ranks - rank, microbatches)
        assert gpipe.peak_in_flight(rank) == microbatches


def split(name: str, ranks: int, microbatches: int, chunks: int, times: tuple[float, float, float]) -> Timeline:
    """``times`` are F, B and W of one microbatch through all chunks of a rank."""
    forward, backward, weight = times
    costs = {Op.F: forward, Op.B: backward + weight, Op.I: backward, Op.W: weight}
    schedule = build_schedule(name, ranks, microbatches, chunks)
    return simulate(schedule, lambda action: costs[action.op] / chunks)


@given(
    ranks=st.integers(1, 6),
    microbatches=st.integers(0, 12),
    chunks=st.integers(2, 5),
    costs=st.tuples(times, times, times),
)
def test_interleaving_divides_the_bubble(
    ranks: int, microbatches: int, chunks: int, costs: tuple[float, float, float]
) -> None:
    """From one microbatch a rank on, whether or not they divide into rounds of ``ranks``."""
    microbatches += ranks
    timeline = split("1f1b", ranks, microbatches, chunks, costs)
    forward, backward, weight = costs
    bubble = bubble_time("1f1b", num_ranks=ranks, forward=forward, backward=backward, weight=weight, chunks=chunks)
    assert timeline.makespan == pytest.approx(microbatches * sum(costs) + bubble, rel=EXACT)
    share = bubble_share(bubble, num_microbatches=microbatches, stage=sum(costs))
    assert timeline.bubble == pytest.approx(share, abs=EXACT)
    assert timeline.span_bubble == pytest.approx(share, abs=EXACT)  # rank 0 starts first and ends last
    if microbatches % ranks == 0 and microbatches > ranks:
        held = [timeline.peak_in_flight(rank) for rank in range(ranks)]
        assert held == [2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1 for rank in range(ranks)]


@given(ranks=st.integers(1, 6), microbatches=st.integers(0, 12), weight=times, more=st.tuples(times, times))
def test_zb_h1_saves_the_weight_gradient_of_each_rank_behind(
    ranks: int, microbatches: int, weight: float, more: tuple[float, float]
) -> None:
    """(p - 1)(F + B - W) in span where W is the shortest, with 1F1B's memory."""
    microbatches += 2 * ranks
    forward, backward = (weight + extra for extra in more)
    timeline = split("zb-h1", ranks, microbatches, 1, (forward, backward, weight))
    bubble = bubble_time("zb-h1", num_ranks=ranks, forward=forward, backward=backward, weight=weight)
    for rank in range(ranks):
        idle = timeline.span(rank) - timeline.busy(rank)
        behind = (ranks - 1 - rank) / max(1, ranks - 1)
        assert idle == pytest.approx(bubble * behind, rel=EXACT, abs=EXACT)
        assert timeline.peak_in_flight(rank) == ranks
    share = bubble_share(bubble, num_microbatches=microbatches, stage=forward + backward + weight)
    assert timeline.span_bubble == pytest.approx(share, abs=EXACT)


@given(ranks=st.integers(1, 6), microbatches=st.integers(0, 12), time=times)
def test_zb_v_never_waits_in_its_span(ranks: int, microbatches: int, time: float) -> None:
    """Where F = B = W, at the memory of 1F1B: p microbatches on both of a rank's chunks."""
    microbatches += 2 * ranks
    timeline = split("zb-v", ranks, microbatches, 2, (time, time, time))
    assert timeline.span_bubble == pytest.approx(0.0, abs=EXACT)
    assert [timeline.peak_in_flight(rank) for rank in range(ranks)] == [2 * ranks] * ranks


@pytest.mark.parametrize(
    ("name", "chunks", "barrier", "span"),
    [
        ("gpipe", 1, 8.57, 8.57),
        ("1f1b", 1, 8.57, 8.57),
        ("1f1b", 5, 1.84, 1.84),
        ("zb-h1", 1, 3.03, 3.03),
        ("zb-v", 2, 1.54, 0),
    ],
)
def test_the_bubbles_of_four_ranks_and_32_microbatches(name: str, chunks: int, barrier: float, span: float) -> None:
    timeline = split(name, 4, 32, chunks, (1, 1, 1))
    assert 100 * timeline.bubble == pytest.approx(barrier, abs=0.005)
    assert 100 * timeline.span_bubble == pytest.approx(span, abs=0.005)


def test_a_slow_stage_sets_the_pace() -> None:
    """Uneven stages: a head that costs twice makes everyone wait for it in the steady state."""
    slow = simulate(build_schedule("1f1b", 4, 32), lambda action: 2.0 if action.stage == 3 else 1.0)
    assert slow.makespan == pytest.approx(32 * 2 * 2 + 2 * 3, rel=EXACT)


def test_a_hop_delays_only_between_ranks() -> None:
    schedule = forward_only((0, 1, 2), 1)
    assert simulate(schedule, lambda action: 1.0, hop=0.5).makespan == pytest.approx(4.0, rel=EXACT)
    on_one_rank = {0: [Action(Op.F, stage, 0) for stage in range(3)]}
    assert simulate(on_one_rank, lambda action: 1.0, hop=0.5).makespan == pytest.approx(3.0, rel=EXACT)


def test_a_deadlock_is_an_error_here_too() -> None:
    with pytest.raises(ScheduleError, match="wait for one another"):
        simulate({0: [Action(Op.B, 0, 0), Action(Op.F, 0, 0)]}, lambda action: 1.0)


@st.composite
def any_run(draw: st.DrawFn) -> tuple[str, int, int, int, list[float], tuple[float, float, float]]:
    """A schedule of any kind, ranks, microbatches, chunks, the share of every stage, and F, B and W."""
    name = draw(st.sampled_from(["gpipe", "1f1b", "zb-h1", "zb-v"]))
    ranks, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    chunks = {"zb-h1": 1, "zb-v": 2}.get(name) or draw(st.integers(1, 5))
    shares = draw(st.lists(times, min_size=ranks * chunks, max_size=ranks * chunks))
    return name, ranks, microbatches, chunks, shares, draw(st.tuples(times, times, times))


def uneven(
    run: tuple[str, int, int, int, list[float], tuple[float, float, float]], hop: float
) -> tuple[Timeline, list[float]]:
    """The simulated run, and the whole time of one microbatch on each stage."""
    name, ranks, microbatches, chunks, shares, (forward, backward, weight) = run
    costs = {Op.F: forward, Op.B: backward + weight, Op.I: backward, Op.W: weight}
    schedule = build_schedule(name, ranks, microbatches, chunks)
    timeline = simulate(schedule, lambda action: costs[action.op] * shares[action.stage], hop)
    return timeline, [share * (forward + backward + weight) for share in shares]


@given(run=any_run(), hop=st.floats(0, 2))
def test_laws_of_any_timeline(
    run: tuple[str, int, int, int, list[float], tuple[float, float, float]], hop: float
) -> None:
    """Nothing runs before its inputs, no rank does two things at once, and no step beats its own work."""
    name, ranks, microbatches, chunks, shares, (forward, backward, weight) = run
    timeline, whole = uneven(run, hop)
    rank_of = {action: rank for rank, program in timeline.schedule.items() for action in program}
    for rank, program in timeline.schedule.items():
        assert timeline.busy(rank) == pytest.approx(
            microbatches * sum(whole[stage] for stage in {action.stage for action in program}), rel=EXACT
        )
        for before, after in pairwise(program):
            assert timeline.end[before] <= timeline.start[after]
        for action in program:
            for needed in action.inputs(ranks * chunks):
                under_way = hop if rank_of[needed] != rank else 0.0
                assert timeline.end[needed] + under_way <= timeline.start[action]
        assert timeline.span(rank) <= timeline.makespan * (1 + EXACT)
        assert timeline.busy(rank) <= timeline.span(rank) * (1 + EXACT)
    # one microbatch must go down and, with input gradients at least, up the whole model
    there_and_back = sum(shares) * (forward + (backward + weight if name in ("gpipe", "1f1b") else backward))
    assert timeline.makespan >= there_and_back * (1 - EXACT)
    assert timeline.makespan >= max(map(timeline.busy, timeline.schedule)) * (1 - EXACT)
    assert timeline.origin == timeline.start[Action(Op.F, 0, 0)] == 0
    assert -EXACT <= timeline.bubble < 1


@given(run=any_run(), hop=st.floats(0, 2), more=st.floats(0, 2))
def test_slower_links_never_make_a_step_shorter(
    run: tuple[str, int, int, int, list[float], tuple[float, float, float]], hop: float, more: float
) -> None:
    fast, slow = uneven(run, hop)[0], uneven(run, hop + more)[0]
    assert fast.makespan <= slow.makespan * (1 + EXACT)
    assert all(fast.end[action] <= slow.end[action] * (1 + EXACT) for action in fast.end)


@given(run=any_run())
def test_no_rank_holds_more_than_its_schedule_promises(
    run: tuple[str, int, int, int, list[float], tuple[float, float, float]],
) -> None:
    """Whatever the times are; rounds of interleaving are longer where microbatches do not come out in ``ranks``."""
    name, ranks, microbatches, chunks, *_ = run
    timeline = uneven(run, 0.0)[0]
    longest = -(-microbatches // max(1, microbatches // ranks))
    for rank in range(ranks):
        interleaved = 2 * (ranks - rank - 1) + (chunks - 1) * longest + 1
        promised = {
            "gpipe": microbatches * chunks,
            "1f1b": ranks - rank if chunks == 1 else interleaved,
            "zb-h1": ranks,
            "zb-v": 2 * ranks,
        }[name]
        assert timeline.peak_in_flight(rank) <= min(promised, microbatches * chunks)
        assert timeline.peak_microbatches(rank) == timeline.peak_in_flight(rank) / chunks
