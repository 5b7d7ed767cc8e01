"""The loader's benchmark on a thousand documents: ways that read apart, and the ratio to a peer."""

import json
import os

import pytest

from benchmarks import loader, megatron_core


def test_what_is_measured_apart_has_a_process_of_its_own():
    assert loader.apart(os.getppid) == os.getpid()


def test_start_up_and_reading_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "apart", lambda measure, *args: measure(*args))  # one starts in seconds
    out = tmp_path / "x.json"
    assert loader.main(["--tiny", "--rounds", "2", "--out", str(out), "--folder", str(tmp_path)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert tables["data set"][0]["documents"] == 1000
    assert [row["start"] for row in tables["start-up"]] == ["first, builds the indices", "later"]
    ours = [row for row in tables["reading"] if row["reader"] == loader.OURS]
    assert [row["rules"] for row in ours] == [*loader.RULES]
    assert all(row["samples_per_second"] > 0 and row["calls"] == 2 for row in ours)


@pytest.mark.parametrize("has_peer", [False, True])
def test_no_two_ways_read_the_same_samples(tmp_path, monkeypatch, has_peer):
    options = loader.Options(documents=1000, seq_lens=(64,), batch=8, rounds=3)
    prefix = tmp_path / "data"
    loader.write_documents(prefix, options)
    fetched, read_by_peer = {}, []

    class Samples:
        def __getitem__(self, number):
            read_by_peer.append(number)

    class Loader:
        def __init__(self, rules):
            self.rules = rules

        def fetch(self, start, count):
            fetched.setdefault(self.rules, []).extend(range(start, start + count))

    monkeypatch.setattr(loader, "_loader", lambda source, rules: Loader(rules))
    monkeypatch.setattr(megatron_core, "IS_INSTALLED", has_peer)
    monkeypatch.setattr(megatron_core, "gpt_dataset", lambda *args, **kwargs: Samples())
    ticks = iter(range(10**6))
    monkeypatch.setattr(loader.time, "process_time", lambda: next(ticks))
    rows = loader.read(prefix, 64, options)
    read = [number for numbers in fetched.values() for number in numbers] + read_by_peer
    assert len(read) == len({*read}), "each sample once"
    assert {len(numbers) for numbers in fetched.values()} == {8 * 5}, "3 rounds, and two before"
    ratios = [row["ratio"] for row in rows if row["reader"] == loader.OURS]
    assert ratios == ([1.0, 1.0, None] if has_peer else [None] * 3)
