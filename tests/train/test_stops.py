"""Who may ask a run to stop, when it takes effect, and what is saved."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.checkpoint import store
from megatron_aquila.errors import RunFolderError, Stopped
from megatron_aquila.train import evaluate as evaluating
from megatron_aquila.train.saving import Saver
from megatron_aquila.train.stops import StopRequest, stop_on_signals
from tests.train.runs import Recorder, run, split, tiny_config


def test_before_training_a_signal_ends_the_process_at_once() -> None:
    with stop_on_signals(), pytest.raises(Stopped) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    assert not isinstance(caught.value, Exception), "it would be taken for a failure on the way"


def test_in_training_signals_ask_once_and_the_second_sigint_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stops:
        stops.begin()
        assert not stops.is_asked
        signal.raise_signal(signal.SIGTERM)
        assert stops.is_asked
        assert stops.reason == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_reasons_name_their_cause(tmp_path: Path) -> None:
    stops = StopRequest()
    assert "another rank" in stops.reason
    stops.limit(minutes=1e-9, file=None)
    time.sleep(0.001)
    assert "--exit-minutes" in stops.reason
    file = tmp_path / "stop"
    stops.limit(minutes=None, file=file)
    assert not stops.is_asked
    file.touch()
    assert stops.is_asked
    assert str(file) in stops.reason
    stops.honour()
    assert not file.exists(), "the next run would stop at once"
    stops.honour()


def test_a_lost_lock_is_noticed_where_stops_are_asked_for() -> None:
    def lost() -> None:
        raise RunFolderError("taken over")

    stops = StopRequest()
    stops.check = lost
    with pytest.raises(RunFolderError, match="taken over"):
        assert stops.is_asked


class Saves(Recorder):
    """Counts the checkpoints of each step."""

    def of(self, step: int) -> int:
        return sum(f"step_{step:07d}" in note for note in self.notes)


def test_a_stop_file_stops_before_the_next_step_and_saves_once(tmp_path: Path) -> None:
    file = tmp_path / "enough"

    class Touching(Saves):
        def step(self, report: Any) -> None:
            super().step(report)
            if report.step == 3:
                file.touch()

    recorder = run(tiny_config(tmp_path, stop_file=file), recorder=Touching())
    assert [report.step for report in recorder.reports] == [1, 2, 3]
    assert isinstance(recorder, Saves)
    assert (recorder.of(2), recorder.of(3)) == (1, 1)
    assert "was found" in recorder.notes[-1]
    assert not file.exists()


@pytest.mark.parametrize("place", ["begin", "finish"])
def test_a_signal_within_a_save_does_not_save_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(Saver, place)

    def signalled(saver: Saver, *args: Any) -> None:
        if place == "begin" or saver._under_way is not None:
            signal.raise_signal(signal.SIGTERM)
        right(saver, *args)

    monkeypatch.setattr(Saver, place, signalled)
    recorder = run(tiny_config(tmp_path), recorder=Saves())
    assert isinstance(recorder, Saves)
    assert recorder.of(len(recorder.reports)) == 1
    assert recorder.of(2) == 1
    assert "SIGTERM" in recorder.notes[-1]


def test_a_stop_file_is_honoured_once_the_save_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, there = tmp_path / "enough", store.put_in_place, []

    class Touching(Recorder):
        def step(self, report: Any) -> None:
            if report.step == 3:
                file.touch()

    def placed(temporary: Path, final: Path) -> None:
        there.append((final.name, file.exists()))
        right(temporary, final)

    monkeypatch.setattr(store, "put_in_place", placed)
    run(tiny_config(tmp_path, stop_file=file, eval_interval=0), recorder=Touching())
    assert there[-1] == ("step_0000003", True), "a kill here would make the next start go on"
    assert not file.exists()


def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    file.touch()
    recorder = run(tiny_config(tmp_path, stop_file=file))
    assert recorder.reports == []
    assert not (tmp_path / "run").exists()


def validation_cut_on_rank_1(folder: Path) -> tuple[list[int], list[int], list[str]]:
    """Rank 1 is asked to stop within the first validation's first batch."""
    asked_at = []

    def agree(*args: Any, **words: Any) -> Any:
        found = right(*args, **words)
        asked_at.append(1)
        if len(asked_at) == 1 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return found

    right, evaluating.agree = evaluating.agree, agree
    try:
        recorder = run(split(tiny_config(folder, eval_iters=3), pp=2))
    finally:
        evaluating.agree = right
    return [r.step for r in recorder.reports], [step for step, _ in recorder.validations], recorder.notes


def test_a_validation_is_cut_between_batches_on_all_ranks_alike(tmp_path: Path, pool: Any) -> None:
    for rank, (steps, validations, notes) in enumerate(pool(2).run(validation_cut_on_rank_1, tmp_path)):
        assert steps == [1, 2, 3]
        assert validations == []
        assert any("step_0000003" in note for note in notes)
        assert ("SIGTERM" if rank == 1 else "another rank") in notes[-1]


def test_a_stop_file_that_came_with_the_end_has_served_too(tmp_path: Path) -> None:
    file = tmp_path / "enough"

    class Touching(Recorder):
        def step(self, report: Any) -> None:
            if report.step == 6:
                file.touch()

    recorder = run(tiny_config(tmp_path, stop_file=file), recorder=Touching())
    assert "--train-samples 48 are consumed" in recorder.notes[-1]
    assert not file.exists(), "a longer run would stop at once"
