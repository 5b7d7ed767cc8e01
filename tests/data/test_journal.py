"""What a journal tells is what was said to it, up to the last whole line; a damaged one says so."""

import json
from pathlib import Path

import pytest

from megatron_aquila.data import journal as module
from megatron_aquila.data.journal import Appended, Journal, Story
from megatron_aquila.data.shards import Counts, Shard
from megatron_aquila.errors import DataError

FIRST = Appended(Shard(0, 2, 9, None, Counts(documents=3), (7,)), {"a": 3}, {"a": "x"})


def told(folder: Path) -> Story:
    journal = Journal(folder)
    try:
        return journal.read()
    finally:
        journal.close()


def test_a_story(tmp_path: Path) -> None:
    assert told(tmp_path) == Story()
    journal = Journal(tmp_path)
    journal.begin({"key": 1})
    journal.add(FIRST)
    journal.close()
    assert told(tmp_path) == Story({"key": 1}, (FIRST,))
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + b'{"index": 1, "cou')
    assert told(tmp_path) == Story({"key": 1}, (FIRST,))
    assert (tmp_path / "journal.jsonl").read_bytes() == whole
    journal = Journal(tmp_path)
    journal.finish({"text": {}}, ["bad.jsonl"])
    journal.close()
    assert told(tmp_path) == Story({"key": 1}, (FIRST,), {"text": {}}, ("bad.jsonl",))
    journal = Journal(tmp_path)
    journal.begin({"key": 2})
    journal.close()
    assert told(tmp_path) == Story({"key": 2})


@pytest.mark.parametrize("line", ["oops", "\x00\x00", "[1]", "3", '{"index": 1}', '{"manifests": 1, "extra": 2}'])
def test_a_damaged_journal(tmp_path: Path, line: str) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps({"key": 1}) + f"\n{line}\n")
    way_out = rf"journal.jsonl:2: no line of a journal, it was damaged .*; give --overwrite .* or remove {tmp_path}"
    with pytest.raises(DataError, match=way_out):
        told(tmp_path)


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    journal = Journal(tmp_path)
    with pytest.raises(DataError, match="another process is writing it; wait for its end"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()
