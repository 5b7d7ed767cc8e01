import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.errors import DataError
from megatron_aquila.observe.ledger import LEDGER_NAME, Ledger, joined, outside, read_ledger


def test_events_are_appended_and_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / LEDGER_NAME
    first = Ledger(path)
    first.write("start", run="a", note="völlig")
    first.close()
    second = Ledger(path)
    second.write("stop", samples=3)
    second.close()
    events = read_ledger(tmp_path / "run")
    assert [event["event"] for event in events] == ["start", "stop"]
    assert events[0]["note"] == "völlig"
    assert events == read_ledger(path)
    assert events[0]["time"] <= events[1]["time"]


@pytest.mark.parametrize("torn", [b"{", b'{"event": "sto', b'{"event": "stop", "time": "x"}'])
def test_a_torn_last_line_is_no_event_and_is_cut_off_by_the_next(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    Ledger(path).write("start", run="a")
    with path.open("ab") as file:
        file.write(torn)
    assert [event["event"] for event in read_ledger(path)] == ["start"]
    Ledger(path).write("checkpoint", name="step_0000001")
    assert [event["event"] for event in read_ledger(path)] == ["start", "checkpoint"]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"event": "start"}', "\udcff"])
def test_another_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    good = json.dumps({"event": "start", "time": ""})
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: not an event"):
        read_ledger(path)


def test_no_ledger_is_said_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file.*--save folder"):
        read_ledger(tmp_path / "nowhere")


def test_a_full_disk_is_complained_of_and_the_next_event_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[str] = []
    ledger = Ledger(tmp_path / LEDGER_NAME, complain=complaints.append)
    ledger.write("start")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        ledger.write("checkpoint")
    assert len(complaints) == 1
    assert "checkpoint was not written" in complaints[0]
    ledger.write("stop")
    ledger.close()
    assert [event["event"] for event in read_ledger(tmp_path)] == ["start", "stop"]


def test_a_disk_that_takes_half_a_line_is_complained_of(tmp_path: Path) -> None:
    complaints: list[str] = []
    ledger = Ledger(tmp_path / LEDGER_NAME, complain=complaints.append)

    class Half:
        """A file that takes half of what it is given."""

        def __init__(self) -> None:
            self.file = ledger._file
            self.whole = False

        def truncate(self, size: int) -> int:
            return self.file.truncate(size)

        def write(self, data: bytes) -> int:
            return self.file.write(data if self.whole else data[: len(data) // 2])

        def fileno(self) -> int:
            return self.file.fileno()

    half = Half()
    ledger._file = half  # type: ignore[assignment]
    ledger.write("start")
    assert "the disk took" in complaints[0]
    half.whole = True
    ledger.write("stop")
    assert [event["event"] for event in read_ledger(tmp_path)] == ["stop"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_joined_ranges_hold_the_same_numbers_in_order(ranges: list[tuple[int, int]]) -> None:
    found = joined(tuple(ranges))
    assert {n for start, stop in found for n in range(start, stop)} == {n for a, b in ranges for n in range(a, b)}
    assert all(start < stop for start, stop in found)
    assert all(stop < after for (_, stop), (after, _) in pairwise(found))


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)))


@given(RANGES, RANGES)
def test_what_is_outside_of_ranges_is_in_the_first_and_not_in_the_others(
    ranges: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    first, second = ({n for a, b in found for n in range(a, b)} for found in (ranges, others))
    found = outside(tuple(ranges), tuple(others))
    assert {n for start, stop in found for n in range(start, stop)} == first - second
    assert found == joined(found)
