"""What a run tells its ledger; whole runs by their command line are in commands/test_ledger.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.config.derive import derive
from megatron_aquila.observe.ledger import LEDGER_NAME, Ledger, read_ledger
from megatron_aquila.observe.lineage import check_ledger
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train import record
from megatron_aquila.train.record import RunRecord, commit, plain, unrecorded
from megatron_aquila.train.start import find_start, resolve_checkpoint
from megatron_aquila.train.state import TrainState
from tests.train.runs import Recorder, run, tiny_config
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


def without_last(folder: Path, event: str) -> list[dict[str, Any]]:
    """Cut off the ledger what follows the last such event, and that too; what was cut off."""
    events = read_ledger(folder)
    last = max(number for number, one in enumerate(events) if one["event"] == event)
    lines = (folder / LEDGER_NAME).read_text().splitlines(keepends=True)
    (folder / LEDGER_NAME).write_text("".join(lines[:last]))
    return [dict(one) for one in events[last:]]


def test_a_checkpoint_that_a_kill_kept_from_the_ledger_is_recorded_at_the_next_start(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, eval_interval=0, exit_samples=32)
    folder = config.checkpoint.save
    assert folder is not None
    ledger = Ledger(folder / LEDGER_NAME)
    ledger.write("start", origin="fresh", run="r", checkpoint=None, samples=0, skipped=[])
    for event in run(config).events:
        ledger.write(event.pop("event"), **event)
    again = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    derived, world = derive(again, 1), ParallelContext.single().world
    start = find_start(again, derived, resolve_checkpoint(again.checkpoint, world), None)
    assert unrecorded(again, start) is None, "the ledger has it"
    missing, _ = without_last(folder, "checkpoint")
    found = unrecorded(again, start)
    assert found is not None
    assert json.loads(json.dumps(found)) == {name: missing[name] for name in missing if name not in ("event", "time")}
    # a step that was saved before, in a part of the run that was given up, is another checkpoint
    earlier = missing | {"time": "2020-01-01T00:00:00+00:00"}
    with (folder / LEDGER_NAME).open("a") as file:
        file.write(json.dumps(earlier) + "\n")
    assert unrecorded(again, start) is not None
    elsewhere = replace(again, checkpoint=replace(again.checkpoint, save=tmp_path / "other"))
    assert unrecorded(elsewhere, start) is None, "of another folder's run"
    assert unrecorded(again, replace(start, checkpoint=None)) is None
    (folder / LEDGER_NAME).unlink()
    assert unrecorded(again, start) is None, "of a run without a ledger"
