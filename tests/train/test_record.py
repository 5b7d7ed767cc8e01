"""What a run tells its ledger; whole runs by their command line are in commands/test_ledger.py."""

from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.observe.lineage import check_ledger
from megatron_aquila.train import record
from megatron_aquila.train.record import RunRecord, commit, plain
from megatron_aquila.train.state import TrainState
from tests.train.runs import Recorder
from tests.train.test_upcoming import source


def test_a_checkpoint_that_is_written_while_the_run_goes_on_tells_what_it_holds() -> None:
    recorder = Recorder()
    kept = RunRecord(recorder, source())  # type: ignore[arg-type]
    state = TrainState(seed=1, index_segments=(300,))

    def step(state: TrainState) -> TrainState:
        kept.took((state.consumed_samples, state.consumed_samples + 8))
        return state.moved_on(samples=8, tokens=8)

    first = kept.to_be_saved(step(step(state)))
    ahead = step(TrainState(seed=1, index_segments=(300,), step=2, consumed_samples=16, parent="step_0000002"))
    second = kept.to_be_saved(ahead)  # begun before the first one is whole
    kept.saved(Path("run/step_0000002"))
    kept.saved(Path("run/step_0000003.old"))
    kept.took((24, 32))
    kept.stopped(second, "asked to", failed=True)
    begin: dict[str, Any] = {"event": "start", "origin": "fresh", "checkpoint": None, "samples": 0}
    report = check_ledger([begin, *recorder.events])
    assert report.holds, report.problems
    assert [(one.name, one.ranges) for one in report.lineage] == [
        ("step_0000002", ((0, 16),)),
        ("step_0000003", ((16, 24),)),
    ]
    assert report.given_up == ((24, 32),)
    assert first.upcoming is not None
    assert recorder.notes[0] == f"the next samples, 16-143: digest {first.upcoming.digest}"


def test_settings_are_json() -> None:
    assert plain((Path("a"), 1, None, True, ("x",))) == ["a", 1, None, True, ["x"]]


def test_the_commit_is_the_source_trees_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SOURCE_TREE", tmp_path)
    assert commit() is None, "installed as a package"
    (tmp_path / ".git").mkdir()
    assert commit() is None, "no repository"
