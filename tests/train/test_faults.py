"""Bad numbers, in whole runs: what is left out, what is gone back to, and that all ranks do the same."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import AquilaError, CheckpointError
from megatron_aquila.observe.lineage import check_ledger
from megatron_aquila.observe.report import StepReport
from megatron_aquila.optim.clip import Clip
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.scaler import LossScale, LossScaling
from megatron_aquila.train import faults, trainer
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.step import Step, StepOutcome
from megatron_aquila.verify.pool import WorkerError, WorkerPool
from tests.train.runs import Recorder, run, split, tiny_config

Pools = Callable[[int], WorkerPool]

REPORT = StepReport(
    step=20,
    consumed_samples=160,
    global_batch=8,
    num_tokens=128,
    computed_tokens=128,
    loss=4.0,
    grad_norm=math.inf,
    lr=1e-3,
    loss_scale=2.0,
    applied=False,
    seconds=1.0,
    data_seconds=0.0,
    memory_bytes=0,
)


def set_train(config: RunConfig, **train: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **train))


def poisoned(calls: set[int], factor: float) -> Any:
    """``clip`` of an optimizer whose gradients are ``factor`` times too large at some calls, the first being 1."""
    right, seen = DistributedOptimizer.clip, itertools.count(1)

    def clip(self: DistributedOptimizer, max_norm: float, *, loss_scale: float = 1.0) -> Clip:
        found = right(self, max_norm, loss_scale=loss_scale)
        return Clip.at(found.norm * factor, max_norm) if next(seen) in calls else found

    return clip


def run_poisoned(
    config: RunConfig, calls: set[int], factor: float, ahead: bool = False
) -> tuple[list[str], list[dict[str, Any]], list[tuple[int, float, bool]]]:
    """What a rank noted, recorded and reported of a run with too large gradients at some calls of ``clip``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedOptimizer, "clip", poisoned(calls, factor))
        if ahead:
            patch.setattr(trainer, "runs_ahead", lambda machine: True)
        recorder = Recorder()
        run(config, recorder=recorder)
    notes = [note for note in recorder.notes if not note.startswith("saved")]  # with the time it took on this rank
    return notes, recorder.events, [(r.step, r.loss, r.applied) for r in recorder.reports]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {name: reader.read(name) for name in reader.tensors}


def ledger_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A ledger of a run that began afresh and recorded these events."""
    return [{"event": "start", "origin": "fresh", "checkpoint": None, "samples": 0}, *events]


def test_twenty_in_a_row_end_the_run_and_steps_that_lower_the_loss_scale_do_not_count() -> None:
    scaling = LossScaling(initial=2.0**32, minimum=1.0, window=1000, hysteresis=2)
    state = TrainState(seed=1, index_segments=(1000,))
    for scale, rule, is_lost in (
        (LossScale(2.0), scaling, False),
        (LossScale(1.0), scaling, True),
        (LossScale(64.0), LossScaling.constant(64.0), True),
    ):
        judge = faults.Judge(tiny_config_train(), rule)

        def look(number: int, judge: faults.Judge = judge, scale: LossScale = scale) -> faults.Fault | None:
            step = Step(state=state, samples=(8 * number, 8 * number + 8), told=None)
            return judge.fault(step, StepOutcome(replace(state, loss_scale=scale), REPORT, is_finite=False))

        found = [look(number) for number in range(19)]
        assert all((fault is not None) == is_lost for fault in found)
        if is_lost:
            with pytest.raises(AquilaError, match=r"20 steps, samples 0 to 160.*lower --lr"):
                look(19)
        else:
            look(19)


def tiny_config_train() -> Any:
    return RunConfig().train


@pytest.mark.parametrize("ahead", [False, True])
def test_stop_saves_what_was_before_and_names_the_samples(ahead: bool, tmp_path: Path) -> None:
    config = set_train(tiny_config(tmp_path), on_nonfinite="stop", eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=100))
    with pytest.raises(AquilaError, match=r"step 3, samples 16-23: not finite .*a run that resumes goes past it"):
        run_poisoned(config, {3}, math.nan, ahead)
    state = CheckpointReader(tmp_path / "run").state["train"]
    assert state["skipped_samples"] == [[16, 24]]  # type: ignore[index,call-overload]
    assert state["step"] == (4 if ahead else 3), "the step that was under way is kept"  # type: ignore[index,call-overload]


def test_rewind_goes_on_as_a_run_that_left_the_samples_out(pool: Pools, tmp_path: Path) -> None:
    config = split(set_train(tiny_config(tmp_path), on_nonfinite="rewind"), tp=2)
    ranks = pool(4).run(run_poisoned, config, {4}, math.nan)
    assert all(one == ranks[0] for one in ranks[1:]), "every rank decides the same"
    notes, events, rows = ranks[0]
    assert [row[0] for row in rows] == [1, 2, 3, 4, 3, 5, 6], "step 4 is passed over"
    assert any("back to step_0000002, step 2, without samples 24-31" in note for note in notes)
    report = check_ledger(ledger_of(events))
    assert report.holds, report.problems
    assert (report.consumed, report.skipped, report.given_up) == (((0, 48),), ((24, 32),), ((16, 32),))
    other = set_train(config, skip_samples=("24-31",))
    other = replace(other, checkpoint=replace(other.checkpoint, save=tmp_path / "left out"))
    pool(4).run(run, other)
    expected, found = tensors(tmp_path / "left out"), tensors(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_is_ahead_goes_back_too(tmp_path: Path) -> None:
    config = set_train(tiny_config(tmp_path), on_nonfinite="rewind")
    _, events, _ = run_poisoned(config, {3}, math.nan, ahead=True)
    assert [event["event"] for event in events].count("rewind") == 1
    report = check_ledger(ledger_of(events))
    assert report.holds, report.problems
    assert report.skipped == ((16, 24),)


def test_a_run_goes_back_to_one_checkpoint_a_few_times_and_not_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "MAX_REWINDS", 2)
    config = set_train(tiny_config(tmp_path), on_nonfinite="rewind", eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=3))
    with pytest.raises(CheckpointError, match=r"gone back to .*step_0000003 2 times"):
        run_poisoned(config, set(range(4, 100)), math.nan)
    fresh = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "fresh"))
    with pytest.raises(CheckpointError, match=r"samples 0-7: not finite .*no checkpoint is there to go back to"):
        run_poisoned(fresh, {1}, math.nan)


def test_a_run_that_began_from_weights_alone_goes_back_to_its_own_checkpoint_whole(tmp_path: Path) -> None:
    base = set_train(tiny_config(tmp_path), on_nonfinite="rewind", eval_interval=0)
    run(replace(set_train(base, exit_samples=16), checkpoint=replace(base.checkpoint, save=tmp_path / "weights")))
    weights = replace(base.checkpoint, load=tmp_path / "weights", load_optim=False)
    _, events, rows = run_poisoned(replace(base, checkpoint=weights), {4}, math.nan)
    assert [row[0] for row in rows] == [1, 2, 3, 4, 3, 5, 6], "back to step 2 of its own, not to the beginning"
    assert check_ledger(ledger_of(events)).skipped == ((24, 32),)
    skip = set_train(replace(base, checkpoint=replace(weights, save=tmp_path / "left out")), skip_samples=("24-31",))
    run(skip)
    expected, found = tensors(tmp_path / "left out"), tensors(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected), "moments of Adam included"


def test_a_fault_that_comes_to_light_at_a_stop_is_left_out_and_is_no_failure(tmp_path: Path) -> None:
    config = set_train(tiny_config(tmp_path), on_nonfinite="rewind", eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=100))
    recorder = Recorder(kill_at=2)  # told of once step 3 is launched, which is settled when the run stops before step 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedOptimizer, "clip", poisoned({3}, math.nan))
        patch.setattr(trainer, "runs_ahead", lambda machine: True)
        run(config, recorder=recorder)
    assert "SIGTERM" in recorder.notes[-1]
    state: Any = CheckpointReader(tmp_path / "run").state["train"]
    assert (state["step"], state["skipped_samples"]) == (3, [[16, 24]])
    assert [event["event"] for event in recorder.events].count("rewind") == 0


def test_ranks_that_go_back_from_different_steps_are_found_out(pool: Pools, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="ranks go back from different steps"):
        pool(2).run(go_back_apart, split(tiny_config(tmp_path)))


def go_back_apart(config: RunConfig) -> None:
    right = faults.Rewinder.back

    def apart(self: faults.Rewinder, fault: faults.Fault, *args: Any) -> TrainState:
        rank = torch.distributed.get_rank()
        return right(self, replace(fault, step=fault.step + rank), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults.Rewinder, "back", apart)
        run_poisoned(set_train(config, on_nonfinite="rewind"), {3}, math.nan)


@pytest.mark.parametrize(("policy", "applied"), [("warn", True), ("skip", False)])
def test_a_spike_is_seen_by_all_ranks_before_the_update(
    policy: str, applied: bool, pool: Pools, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, train_samples=160, spike_window=8, spike_threshold=30.0, on_spike=policy)
    config = split(config, pp=2)
    ranks = pool(4).run(run_poisoned, config, {14}, 1000.0)
    assert all(one == ranks[0] for one in ranks[1:])
    notes, events, rows = ranks[0]
    assert [note for note in notes if "spike" in note], notes
    assert [row for row in rows if not row[2]] == ([] if applied else [rows[13]])
    assert rows[13][0] == 14
    assert [event["samples"] for event in events if event["event"] == "skip"] == ([] if applied else [(104, 112)])


@pytest.mark.parametrize("skips", ["16-23", "3-4 20-29"])
def test_samples_left_out_count_as_consumed_and_are_never_read(skips: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, skip_samples=tuple(skips.split()))
    reports = run(config).reports
    left_out = {number for word in skips.split() for first, last in [word.split("-")]
                for number in range(int(first), int(last) + 1)}  # fmt: skip
    tokens = {report.step: report.num_tokens for report in reports}
    for step in range(1, 7):
        trained = sum(number not in left_out for number in range(8 * step - 8, 8 * step))
        assert tokens.get(step, 0) == 16 * trained
    assert reports[-1].consumed_samples == 48
    plain = run(replace(config, train=replace(config.train, skip_samples=()),
                        checkpoint=replace(config.checkpoint, save=tmp_path / "plain"))).reports  # fmt: skip
    assert [(report.step, report.lr) for report in plain if report.step in tokens] == [(r.step, r.lr) for r in reports]


def test_a_resumed_run_refuses_to_leave_out_what_it_was_trained_on(tmp_path: Path) -> None:
    run(tiny_config(tmp_path, exit_samples=16))
    config = tiny_config(tmp_path, skip_samples=("15-30",))
    config = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    with pytest.raises(CheckpointError, match=r"--skip-samples 15-30: .* stands at sample 16 .*on sample 15; load"):
        run(config)
    reports = run(set_train(config, skip_samples=("16-30",))).reports
    assert [report.step for report in reports] == [4, 5, 6]
    run(set_train(config, skip_samples=("16-30",)))  # a script that is started again and again


def test_a_resumed_run_still_leaves_out_what_the_one_before_was_told_to(tmp_path: Path) -> None:
    run(tiny_config(tmp_path, exit_samples=16, skip_samples=("24-31",)))
    config = tiny_config(tmp_path)
    reports = run(replace(config, checkpoint=replace(config.checkpoint, resume=True))).reports
    assert [report.step for report in reports] == [3, 5, 6]
