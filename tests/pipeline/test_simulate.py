"""The simulator against the closed forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from megatron_aquila.pipeline.simulate import Timeline, simulate

EXACT = 1e-9
times = st.floats(0.1, 10.0)


def run(name: str, ranks: int, microbatches: int, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    costs = {Op.F: forward, Op.B: backward}
    return simulate(build_schedule(name, ranks, microbatches), lambda action: costs[action.op])


@pytest.mark.parametrize("name", SCHEDULES)
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


def test_a_slow_stage_sets_the_pace() -> None:
    """Uneven stages: a head that costs twice makes everyone wait for it in the steady state."""
    slow = simulate(build_schedule("1f1b", 4, 32), lambda action: 2.0 if action.stage == 3 else 1.0)
    assert slow.makespan == pytest.approx(32 * 2 * 2 + 2 * 3, rel=EXACT)


def test_a_hop_delays_only_between_ranks() -> None:
    schedule = forward_only(3, 1)
    assert simulate(schedule, lambda action: 1.0, hop=0.5).makespan == pytest.approx(4.0, rel=EXACT)
    on_one_rank = {0: [Action(Op.F, stage, 0) for stage in range(3)]}
    assert simulate(on_one_rank, lambda action: 1.0, hop=0.5).makespan == pytest.approx(3.0, rel=EXACT)


def test_a_deadlock_is_an_error_here_too() -> None:
    with pytest.raises(ScheduleError, match="wait for one another"):
        simulate({0: [Action(Op.B, 0, 0), Action(Op.F, 0, 0)]}, lambda action: 1.0)
