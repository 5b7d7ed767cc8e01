"""The benchmarks that need no GPU, at tiny sizes."""

import json

import pytest
import torch

from benchmarks import cpu, loader
from benchmarks.common import Record
from megatron_aquila.data.indexed import IndexedDataset


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark sets the threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_steps_and_ops_are_measured_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "LAYOUTS", {"tp 2, pp 2, sequence": cpu.LAYOUTS["tp 2, pp 2, sequence"]})
    out = tmp_path / "x.json"
    flags = ["--tiny", "--threads", "1", "--rounds", "1", "--steps", "1", "--no-compiled", "--clock", "cpu"]
    assert cpu.main([*flags, "--out", str(out)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert [row["name"] for row in tables["step"]] == ["megatron_aquila", "transformers", cpu.MATMUL]
    assert tables["step"][-1]["gemm_share"] == 1
    assert {row["name"] for row in tables["ops"]} >= {"rms_norm", "swiglu", "a whole layer"}
    (traffic,) = tables["traffic"]
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "messages")
    assert traffic["calls"] == sum(traffic[kind] for kind in kinds) > traffic["messages"] > 0


def test_a_call_that_was_not_planned_ends_the_benchmark(monkeypatch):
    monkeypatch.setattr(cpu, "LAYOUTS", {"dp 8": ""})
    monkeypatch.setattr(cpu, "counted_calls", lambda config, rank: [])
    record = Record("cpu", settings=cpu.Options(), device=cpu.CPU, out=None)
    with pytest.raises(AssertionError, match="dp 8: planned 7 calls"):
        cpu.measure_traffic(record)


def test_every_layout_fits_eight_ranks_and_trains_the_same_samples():
    configs = {name: cpu.layout_config(flags) for name, flags in cpu.LAYOUTS.items()}
    assert {config.train.global_batch for config in configs.values()} == {32}
    assert len({config.parallel for config in configs.values()} | {config.train for config in configs.values()}) > 12


def test_both_of_a_pair_compute_the_same_shape():
    pairs = cpu.op_pairs()
    for ours, theirs in pairs.values():
        ours()
        theirs()


def test_the_loader_reads_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "apart", lambda measure, *args: measure(*args))  # a process of its own takes seconds
    out = tmp_path / "x.json"
    assert loader.main(["--tiny", "--rounds", "2", "--out", str(out), "--folder", str(tmp_path)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert tables["data set"][0]["documents"] == 1000
    assert [row["start"] for row in tables["start-up"]] == ["first, builds the indices", "later"]
    ours = [row for row in tables["reading"] if row["reader"] == "megatron_aquila"]
    assert [row["rules"] for row in ours] == list(loader.RULES)
    assert all(row["tokens_per_second"] > 0 for row in tables["reading"])
    assert list(tmp_path.iterdir()) == [out]  # the data set is gone


def test_documents_have_the_lengths_asked_for_and_end(tmp_path):
    options = loader.Options(documents=70_000, mean_tokens=10)
    tokens = loader.write_documents(tmp_path / "set", options)
    dataset = IndexedDataset(tmp_path / "set")
    assert len(dataset) == 70_000
    assert tokens == len(dataset.tokens) == pytest.approx(700_000, rel=0.05)
    assert all(dataset[number][-1] == loader.EOD for number in (0, 1, 65_535, 65_536, 69_999))
    assert (dataset.tokens == loader.EOD).sum() == 70_000
    assert dataset.tokens.max() < loader.VOCAB_SIZE


def test_epochs_lengthen_the_run(tmp_path):
    options = loader.Options(documents=1000, mean_tokens=50, epochs=3)
    loader.write_documents(tmp_path / "set", options)
    assert len(loader.samples_of(tmp_path / "set", 64, options)) >= 3 * 1000 * 50 // 64
