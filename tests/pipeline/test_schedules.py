"""Schedules against our checks, and against torch's validator and generators as a second, independent oracle."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Op, Schedule
from megatron_aquila.pipeline.checks import check
from megatron_aquila.pipeline.schedules import SCHEDULES, build_schedule, forward_only

sizes = st.tuples(st.integers(1, 9), st.integers(1, 24))  # fewer microbatches than ranks, too: a ramp begins so


def torch_schedules() -> object:
    """torch.distributed.pipelining.schedules, or skip: what is used of it is private and may go."""
    module = pytest.importorskip("torch.distributed.pipelining.schedules")
    private = ["_Action", "_validate_schedule", "_add_send_recv", "_simulate_comms_compute"]
    gone = [name for name in private if not hasattr(module, name)]
    if gone:
        pytest.skip(f"this torch has no pipelining.schedules.{gone[0]}")
    return module


@pytest.mark.parametrize("name", SCHEDULES)
@given(size=sizes)
def test_every_schedule_passes_the_checks(name: str, size: tuple[int, int]) -> None:
    ranks, microbatches = size
    check(build_schedule(name, ranks, microbatches), ranks, microbatches)


@given(size=sizes)
def test_forward_only_passes_the_checks_and_has_no_backward(size: tuple[int, int]) -> None:
    ranks, microbatches = size
    schedule = forward_only(ranks, microbatches)
    check(schedule, ranks, microbatches)
    assert {action.op for program in schedule.values() for action in program} == {Op.F}


@pytest.mark.parametrize("name", SCHEDULES)
@given(size=sizes)
def test_backwards_keep_the_order_of_microbatches(name: str, size: tuple[int, int]) -> None:
    """What makes gradients bit-equal to one process: sums run in the same order everywhere."""
    for program in build_schedule(name, *size).values():
        for op in Op:
            assert [a.microbatch for a in program if a.op is op] == list(range(size[1]))


def as_torch(schedule: Schedule, torchs: object) -> dict[int, list[object]]:
    return {rank: [torchs._Action.from_str(str(a)) for a in program] for rank, program in schedule.items()}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (4, 2), (4, 4), (4, 7), (8, 19)])
def test_torchs_validator_and_its_communication_simulator_accept(name: str, ranks: int, microbatches: int) -> None:
    torchs = torch_schedules()
    schedule = as_torch(build_schedule(name, ranks, microbatches), torchs)
    assert torchs._validate_schedule(schedule, ranks, ranks, microbatches) == {r: r for r in range(ranks)}
    with_comms = torchs._add_send_recv(as_torch(build_schedule(name, ranks, microbatches), torchs), int, ranks)
    torchs._simulate_comms_compute(with_comms, int, ranks)  # raises on deadlock
    del schedule[0][-1]
    with pytest.raises(AssertionError):  # the oracle can say no
        torchs._validate_schedule(schedule, ranks, ranks, microbatches)


@pytest.mark.parametrize(("name", "theirs"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 4), (4, 7), (8, 19)])
def test_programs_equal_those_torch_generates(name: str, theirs: str, ranks: int, microbatches: int) -> None:
    torchs = torch_schedules()
    if not hasattr(getattr(torchs, theirs), "_get_pipeline_order"):
        pytest.skip(f"this torch has no {theirs}._get_pipeline_order")
    size = SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches)
    order = getattr(torchs, theirs)._get_pipeline_order(size)
    kept = {r: [str(a) for a in program if a is not None and a.is_compute_op] for r, program in order.items()}
    if name == "1f1b":  # torch 2.13 lists the last rank from F1 to a microbatch that does not exist
        kept.pop(ranks - 1)
    ours = build_schedule(name, ranks, microbatches)
    assert kept == {rank: [str(action) for action in ours[rank]] for rank in kept}


def test_unknown_schedule_names_the_known() -> None:
    with pytest.raises(ScheduleError, match="--schedule zigzag: there is no such schedule; use one of gpipe, 1f1b"):
        build_schedule("zigzag", 2, 2)


@pytest.mark.parametrize(("ranks", "microbatches", "message"), [(0, 1, "needs a rank"), (1, 0, "needs a microbatch")])
def test_empty_pipelines_are_our_mistake(ranks: int, microbatches: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        build_schedule("1f1b", ranks, microbatches)
