"""The ledger's check finds every planted loss, and passes every honest history."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.observe.lineage import check_ledger, left_out_after

Events = list[dict[str, Any]]


def start(at: int = 0, checkpoint: str | None = None, *, origin: str = "auto", own: bool = True) -> dict[str, Any]:
    found = None
    if checkpoint is not None:
        found = {"name": checkpoint, "path": f"elsewhere/{checkpoint}", "own": own, "step": at, "samples": at}
    return {"event": "start", "origin": origin if checkpoint else "fresh", "checkpoint": found, "samples": at}


def saved(at: int, *ranges: tuple[int, int], parent: str | None = None, skipped: Any = ()) -> dict[str, Any]:
    return {
        "event": "checkpoint", "name": f"step_{at}", "parent": parent, "step": at, "samples": at,
        "ranges": [list(one) for one in ranges], "skipped": [list(one) for one in skipped],
    }  # fmt: skip


def stop(at: int, *ranges: tuple[int, int], failed: bool = False) -> dict[str, Any]:
    return {"event": "stop", "step": at, "samples": at, "reason": "", "failed": failed, "ranges": [*map(list, ranges)]}


def rewind(at: int, to: str, *ranges: tuple[int, int], without: Any = ()) -> dict[str, Any]:
    return {"event": "rewind", "step": at, "samples": at, "checkpoint": to, "ranges": [*map(list, ranges)],
            "skipped": [*map(list, without)], "reason": ""}  # fmt: skip


def problems(*events: dict[str, Any]) -> list[str]:
    return list(check_ledger(events).problems)


def test_a_run_that_was_killed_went_back_and_stopped_holds() -> None:
    report = check_ledger([
        start(),
        saved(8, (0, 8)),
        saved(16, (8, 16), parent="step_8"),
        start(16, "step_16"),  # killed in between: what came after 16 is taken again
        rewind(40, "step_16", (16, 40)),
        saved(48, (16, 48), parent="step_16", skipped=[(32, 40)]),
        stop(48),
    ])  # fmt: skip
    assert report.holds, report.problems
    assert [one.name for one in report.lineage] == ["step_8", "step_16", "step_48"]
    assert (report.starts, report.killed, report.rewinds) == (2, 1, 1)
    assert (report.consumed, report.skipped, report.given_up) == (((0, 48),), ((32, 40),), ((16, 40),))


ONE = [start(), saved(8, (0, 8))]


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([start(), saved(16, (0, 8), (9, 16))], "step_16: samples 8 to 9 were never taken"),
        ([start(), saved(16, (0, 8), (7, 16))], "step_16: samples 7 to 8 were taken twice"),
        ([start(), saved(16, (0, 8))], "step_16: samples 8 to 16 were never taken"),
        ([*ONE, start(8, "step_8"), saved(16, (4, 16), parent="step_8")], "samples 4 to 8 were taken twice"),
        ([*ONE, saved(16, (8, 16), parent="step_8"), start(8, "step_8")], "a start from step_8 though step_16 was"),
        ([*ONE, start(4, "step_8")], "a start at sample 4 from step_8, which has 8"),
        ([*ONE, start(6, "step_6")], "a start from step_6, of whose saving nothing is written"),
        ([*ONE, saved(16, (8, 16), parent="step_4")], "step_16 names step_4 as its parent"),
        ([*ONE, rewind(16, "step_2")], "a rewind to step_2, of whose saving nothing is written"),
        ([*ONE, rewind(24, "step_8", without=[(16, 24)]), start(8, "step_8"), saved(32, (8, 32), parent="step_8")],
         "step_32: samples 16 to 24 are in it, though a rewind left them out"),
        ([*ONE, stop(16, (8, 16))], "work is lost: a stop 8 samples beyond step_8 without a save"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_found(events: Events, words: str) -> None:
    found = problems(*events)
    assert any(words in problem for problem in found), found


def test_what_rewinds_left_out_holds_for_every_start_from_before_until_another_checkpoint_takes_the_place() -> None:
    fallback = {"event": "fallback", "bad": "step_16", "checkpoint": "step_8", "reason": "damaged"}
    events = [
        start(),
        saved(8, (0, 8)),
        saved(16, (8, 16), parent="step_8"),
        rewind(32, "step_16", (16, 32), without=[(24, 32)]),
        rewind(24, "step_16", (16, 24), without=[(16, 24)]),
    ]
    assert left_out_after(events, "step_16") == left_out_after(events, "step_8") == ((16, 32),)
    assert left_out_after(events, "step_24") == ()
    events += [fallback, start(8, "step_8"), saved(16, (8, 16), parent="step_8", skipped=[(16, 32)])]
    assert left_out_after(events, "step_16") == (), "the new one knows"
    assert problems(*events, saved(24, (16, 24), parent="step_16", skipped=[(16, 32)])) == []
    assert "though a rewind" in problems(*events[:-1], saved(32, (8, 32), parent="step_8", skipped=[(16, 24)]))[0]


def test_what_was_left_out_is_found_by_any_path_that_a_start_told() -> None:
    events = [start(8, "step_8", own=False, origin="load"), rewind(16, "step_8", (8, 16), without=[(8, 16)])]
    assert left_out_after(events, "/resolved/step_8", "elsewhere/step_8") == ((8, 16),)
    assert left_out_after(events, "/resolved/step_8") == ()
    part = start(16, "step_16")
    part["checkpoint"] |= {"ephemeral": True, "parent": "step_8", "ranges": [[8, 16]]}
    assert problems(events[0], part) == [], "it follows what the run began from"
    part["checkpoint"]["parent"] = "step_4"
    assert "an ephemeral start after step_4" in problems(events[0], part)[0]


def test_an_older_start_is_no_loss_where_it_was_meant_or_the_newer_one_is_damaged() -> None:
    two = [start(), saved(8, (0, 8)), saved(16, (8, 16), parent="step_8")]
    meant = check_ledger([*two, start(8, "step_8", origin="load"), saved(16, (8, 16), parent="step_8")])
    assert meant.holds
    assert meant.given_up == ((8, 16),)
    fallback = {"event": "fallback", "bad": "step_16", "checkpoint": "step_8", "reason": "damaged"}
    assert problems(*two, fallback, start(8, "step_8")) == []


def test_a_start_anew_where_something_was_saved_is_a_loss_of_it() -> None:
    assert check_ledger([*ONE, start()]).given_up == ((0, 8),)


def test_a_stop_that_failed_lost_no_more_than_was_not_saved() -> None:
    report = check_ledger([*ONE, stop(16, (8, 16), failed=True), start(8, "step_8")])
    assert report.holds
    assert report.given_up == ((8, 16),)


def test_a_run_that_came_from_another_folder_begins_there() -> None:
    report = check_ledger([start(8, "step_8", own=False, origin="load"), saved(16, (8, 16), parent="step_8"), stop(16)])
    assert report.holds, report.problems
    assert [one.name for one in report.lineage] == ["elsewhere/step_8", "step_16"]
    assert report.consumed == ((0, 16),)


def test_a_ledger_without_a_checkpoint_holds_nothing() -> None:
    report = check_ledger([start(), stop(16, (0, 16)), {"event": "a later version's"}])
    assert (report.holds, report.lineage, report.consumed) == (True, (), ())


@given(st.data())
def test_every_honest_history_holds_and_one_sample_less_or_more_does_not(data: st.DataObject) -> None:
    events, here, parent, known = [start()], 0, None, {0: None}
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["save", "save", "kill", "rewind"]))
        if what == "save":
            taken = data.draw(st.integers(1, 9))
            events.append(saved(here + taken, (here, here + taken), parent=parent))
            here, parent = here + taken, f"step_{here + taken}"
            known[here] = parent
        elif parent is not None:
            events.append(start(here, parent) if what == "kill" else rewind(here + 3, parent, (here, here + 3)))
    assert problems(*events) == []
    saves = [event for event in events if event["event"] == "checkpoint"]
    if saves:
        broken = data.draw(st.sampled_from(saves))
        broken["ranges"][0][0] += data.draw(st.sampled_from([-1, 1]))
        assert any("were" in problem for problem in problems(*events))


def ephemeral(at: int, parent: str | None, *ranges: tuple[int, int]) -> dict[str, Any]:
    """A start from an ephemeral checkpoint."""
    event = start(at, f"step_{at}")
    return event | {
        "checkpoint": event["checkpoint"] | {"ephemeral": True, "parent": parent, "ranges": [*map(list, ranges)]}
    }


def test_what_an_ephemeral_checkpoint_has_taken_is_in_the_durable_one_after_it() -> None:
    report = check_ledger([
        start(),
        ephemeral(4, None, (0, 4)),
        saved(8, (0, 8)),
        ephemeral(12, "step_8", (8, 12)),
        saved(16, (8, 16), parent="step_8"),
        stop(16),
    ])  # fmt: skip
    assert report.holds, report.problems
    assert [one.name for one in report.lineage] == ["step_8", "step_16"]
    assert (report.consumed, report.starts, report.killed) == (((0, 16),), 3, 2)


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (ephemeral(12, "step_8", (8, 11)), "ephemeral step_12: samples 11 to 12 were never taken"),
        (ephemeral(12, "step_8", (6, 12)), "ephemeral step_12: samples 6 to 8 were taken twice"),
        (ephemeral(12, "step_7", (8, 12)), "an ephemeral start after step_7, of whose saving nothing is written"),
        (ephemeral(12, None, (0, 12)), "work is lost: a start from the beginning though step_8 was saved last"),
        (ephemeral(12, "step_8", (8, 12)) | {"samples": 13}, "a start at sample 13 from ephemeral step_12, which has"),
    ],
)
def test_an_ephemeral_checkpoint_that_does_not_follow_is_found(event: dict[str, Any], problem: str) -> None:
    found = problems(*ONE, event)
    assert any(problem in line for line in found), found
