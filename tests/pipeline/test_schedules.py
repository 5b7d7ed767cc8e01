"""Schedules against our checks, and against torch's validator and generators as a second, independent oracle."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.errors import ScheduleError
from megatron_aquila.pipeline.action import Op, Schedule
from megatron_aquila.pipeline.checks import check
from megatron_aquila.pipeline.schedules import build_schedule, forward_only
from megatron_aquila.plan.stages import stage_ranks

KINDS = [("gpipe", 1), ("gpipe", 3), ("1f1b", 1), ("1f1b", 2), ("1f1b", 5), ("zb-h1", 1), ("zb-v", 2)]  # name, chunks
every_kind = pytest.mark.parametrize(("name", "chunks"), KINDS)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 24))  # fewer microbatches than ranks, too: a ramp begins so


def torch_schedules() -> object:
    """torch.distributed.pipelining.schedules, or skip: what is used of it is private and may go."""
    module = pytest.importorskip("torch.distributed.pipelining.schedules")
    private = ["_Action", "_validate_schedule", "_add_send_recv", "_simulate_comms_compute"]
    gone = [name for name in private if not hasattr(module, name)]
    if gone:
        pytest.skip(f"this torch has no pipelining.schedules.{gone[0]}")
    return module


@every_kind
@given(size=sizes)
def test_every_schedule_passes_the_checks(name: str, chunks: int, size: tuple[int, int]) -> None:
    """At any number of microbatches, so that no stage of a batch ramp needs a stand-in."""
    ranks, microbatches = size
    check(build_schedule(name, ranks, microbatches, chunks), ranks * chunks, microbatches, link_depth=microbatches)


@given(size=sizes)
def test_forward_only_passes_the_checks_and_has_no_backward(size: tuple[int, int]) -> None:
    ranks, microbatches = size
    schedule = forward_only(range(ranks), microbatches)
    check(schedule, ranks, microbatches)
    assert {action.op for program in schedule.values() for action in program} == {Op.F}


def test_forward_only_drains_before_it_fills() -> None:
    """Interleaved and on a V: as few messages as can be wait between the stages, and no rank waits in the middle."""
    loop, v = (forward_only(stage_ranks(name, 3, 2), 4) for name in ("1f1b", "zb-v"))
    assert " ".join(map(str, loop[1])) == "1F0 1F1 1F2 4F0 4F1 4F2 1F3 4F3"
    assert " ".join(map(str, v[1])) == "1F0 1F1 1F2 4F0 1F3 4F1 4F2 4F3"


@every_kind
@given(size=sizes)
def test_stages_stand_where_the_plan_says(name: str, chunks: int, size: tuple[int, int]) -> None:
    ranks, microbatches = size
    placed = placement(build_schedule(name, ranks, microbatches, chunks))
    assert placed == dict(enumerate(stage_ranks(name, ranks, chunks)))


@every_kind
@given(size=sizes)
def test_every_stage_keeps_the_order_of_microbatches(name: str, chunks: int, size: tuple[int, int]) -> None:
    """What makes gradients bit-equal to one process: sums run in the same order everywhere."""
    ranks, microbatches = size
    for program in build_schedule(name, ranks, microbatches, chunks).values():
        for op in {action.op for action in program}:
            for stage in {action.stage for action in program}:
                order = [a.microbatch for a in program if a.op is op and a.stage == stage]
                assert order == list(range(microbatches))


def as_torch(schedule: Schedule, torchs: object) -> dict[int, list[object]]:
    return {rank: [torchs._Action.from_str(str(a)) for a in program] for rank, program in schedule.items()}


def placement(schedule: Schedule) -> dict[int, int]:
    return {action.stage: rank for rank, program in schedule.items() for action in program}


@every_kind
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (4, 2), (4, 4), (4, 7), (8, 19)])
def test_torchs_validator_and_its_communication_simulator_accept(
    name: str, chunks: int, ranks: int, microbatches: int
) -> None:
    torchs = torch_schedules()
    ours = build_schedule(name, ranks, microbatches, chunks)
    schedule, rank_of, stages = as_torch(ours, torchs), placement(ours), ranks * chunks
    assert torchs._validate_schedule(schedule, ranks, stages, microbatches) == rank_of
    with_comms = torchs._add_send_recv(as_torch(ours, torchs), rank_of.__getitem__, stages)
    torchs._simulate_comms_compute(with_comms, rank_of.__getitem__, stages)  # raises on deadlock
    schedule[0] = [action for action in schedule[0] if "F0" not in str(action)]
    with pytest.raises(AssertionError):  # the oracle can say no
        torchs._validate_schedule(schedule, ranks, stages, microbatches)


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


def torchs_programs(theirs: str, ranks: int, microbatches: int, chunks: int) -> dict[int, list[str]]:
    """What torch generates for a schedule of several stages a rank, without building its stages."""
    maker = getattr(torch_schedules(), theirs)
    if not hasattr(maker, "_calculate_single_rank_operations"):
        pytest.skip(f"this torch has no {theirs}._calculate_single_rank_operations")
    rounds = max(1, microbatches // ranks)
    size = SimpleNamespace(
        pp_group_size=ranks,
        n_local_stages=chunks,
        num_stages=ranks * chunks,
        _n_microbatches=microbatches,
        number_of_rounds=rounds,
        microbatches_per_round=microbatches // rounds,
    )
    orders = {rank: maker._calculate_single_rank_operations(size, rank) for rank in range(ranks)}
    return {rank: [str(action) for action in order if action is not None] for rank, order in orders.items()}


@pytest.mark.parametrize(
    ("name", "theirs", "chunks"),
    [("1f1b", "ScheduleInterleaved1F1B", v) for v in (2, 3, 5)] + [("zb-v", "ScheduleZBVZeroBubble", 2)],
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 2), (4, 8), (4, 10), (8, 16)])
def test_chunked_programs_equal_those_torch_generates(
    name: str, theirs: str, chunks: int, ranks: int, microbatches: int
) -> None:
    ours = build_schedule(name, ranks, microbatches, chunks)
    as_text = {rank: [str(action) for action in program] for rank, program in ours.items()}
    assert as_text == torchs_programs(theirs, ranks, microbatches, chunks)


def test_weight_gradients_are_paid_late_but_paid() -> None:
    assert " ".join(map(str, build_schedule("zb-h1", 3, 4)[1])) == "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3"


@pytest.mark.parametrize(("name", "chunks", "has"), [("zb-h1", 2, 1), ("zb-v", 1, 2)])
def test_chunks_a_schedule_does_not_have_are_refused(name: str, chunks: int, has: int) -> None:
    with pytest.raises(
        ScheduleError, match=f"--chunks {chunks}: --schedule {name} has {has} a rank; use --chunks {has}"
    ):
        build_schedule(name, 4, 8, chunks)


def test_unknown_schedule_names_the_known() -> None:
    with pytest.raises(
        ScheduleError, match="--schedule zigzag: there is no such schedule; use one of gpipe, 1f1b, zb-h1, zb-v"
    ):
        build_schedule("zigzag", 2, 2)


@pytest.mark.parametrize(("ranks", "microbatches", "message"), [(0, 1, "needs a rank"), (1, 0, "needs a microbatch")])
def test_empty_pipelines_are_our_mistake(ranks: int, microbatches: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        build_schedule("1f1b", ranks, microbatches)
