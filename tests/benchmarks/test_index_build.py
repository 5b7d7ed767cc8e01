import json

from benchmarks import index_build


def test_both_ways_build_the_same_samples_in_processes_of_their_own(tmp_path):
    out = tmp_path / "x.json"
    assert index_build.main(["--tiny", "--rounds", "1", "--out", str(out)]) == 0
    ours, theirs = json.loads(out.read_text())["tables"]["building"]
    assert [ours["name"], theirs["name"]] == ["megatron_aquila", "numpy"]
    assert ours["samples"] == theirs["samples"] > 1000
    assert 0 < ours["peak_mib"] < 150, "torch, which the index does not need, was imported"
