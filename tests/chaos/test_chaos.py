"""The short form: a handful of faults befall one run; and the drill itself sees what it is there to see."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.verify.page import put
from tests.chaos.drill import Drill, Ground, Outcome, lost_samples
from tests.chaos.faults import KINDS, draw
from tests.chaos.hooks import Marks, Plan
from tests.chaos.table import PAGE, failures, report, table

HANDFUL = ("kill-write", "kill-ledger", "term-save", "flip-checkpoint", "two-runs")


@pytest.mark.end_to_end
def test_a_run_that_a_handful_of_faults_befall_ends_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = Ground.prepare(tmp_path / "ground")
    (tmp_path / "run").mkdir()
    drill = Drill(ground, tmp_path / "run", draw(HANDFUL, random.Random(1)), layout="dp 2", torchrun=False)
    outcomes = drill.go()
    assert failures(outcomes) == []
    assert all(outcome.fired and outcome.recovered and outcome.seconds is not None for outcome in outcomes)
    assert [outcome.fault.kind for outcome in outcomes if outcome.refused] == ["two-runs"]
    # another byte at the end is not overlooked
    monkeypatch.setattr(Ground, "expected", lambda *_: {})
    drill._compare()
    assert all("is not that of the run without faults" in line for line in failures(outcomes))
    assert not any(outcome.recovered for outcome in outcomes)


def start(samples: int) -> dict[str, Any]:
    return {"event": "start", "samples": samples}


def saved(step: int) -> dict[str, Any]:
    return {"event": "checkpoint", "name": f"step_{step:07d}", "step": step, "samples": 8 * step}


def test_a_start_before_the_last_good_checkpoint_loses_samples() -> None:
    passed_over = {"event": "fallback", "bad": "step_0000004"}
    assert lost_samples([start(0), saved(2), saved(4), start(32), saved(5), start(32)]) == [0, 0, 8]
    assert lost_samples([start(0), saved(2), saved(4), passed_over, start(16), saved(4), start(16)]) == [0, 0, 16]


def test_faults_follow_from_the_seed_and_each_is_where_it_can_come() -> None:
    faults = draw([*KINDS] * 4, random.Random(7))
    assert faults == draw([*KINDS] * 4, random.Random(7))
    assert {fault.rank for fault in faults if KINDS[fault.kind].rank_0} == {0}
    assert {fault.rank for fault in faults} == {0, 1}
    assert len(KINDS) >= 12


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    faults = tuple(draw(HANDFUL, random.Random(0)))
    for filler in (None, tmp_path / "filler"):
        plan = Plan(Marks(tmp_path), faults, filler)
        assert Plan.read(plan.write(tmp_path / "plan")) == plan


def test_the_table_counts_what_came_and_the_page_has_a_place_for_it() -> None:
    first, second, third = draw(["kill-step", "kill-step", "cut-data"], random.Random(0))
    outcomes = [
        Outcome(first, "torchrun", "dp 2", fired=True, recovered=True, seconds=3.0),
        Outcome(second, "forked", "pp 2", fired=True, lost=8, seconds=5.0, wrong=["samples were lost: 8"]),
        Outcome(third, "forked", "pp 2", fired=True, refused=True, seconds=1.0),
        Outcome(replace(third, number=3), "forked", "pp 2", wrong=["it did not come"]),
    ]
    rows = table(outcomes).splitlines()
    assert "| SIGKILL at a random moment of training | 1 | 1 | 1 | – | 8 | 4.0 |" in rows
    assert "| data file cut off | 0 | 1 | 0 | 1 | 0 | 1.0 |" in rows
    assert rows[-1] == "| all | 1 | 2 | 1 | 1 | 8 | 3.0 |"
    text = report(outcomes, command="python -m tests.chaos", seed=0, minutes=2.0, disk="a small tmpfs")
    assert "3 injections of 2 classes in 2 minutes, 2 not as they should" in text
    assert text in put(PAGE.read_text(encoding="utf-8"), "chaos", text)
