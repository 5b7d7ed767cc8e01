"""What the benchmarks share: results that say where they come from, turns, and a GPU that may not be there."""

import json
from dataclasses import dataclass

import pytest
import torch

from benchmarks import ceilings, common, fp8, kernels, step
from benchmarks.common import GpuOptions, Record, in_turns, result_file, seconds_of, spread, sustained

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    size: int = 3


def test_results_say_machine_versions_commit_and_load(tmp_path):
    out = tmp_path / "new" / "one.json"
    record = Record("one", settings=Settings(), device=CPU, out=out)
    assert not out.exists()
    record.add("table", seconds=0.5)
    first = json.loads(out.read_text())
    record.add("table", seconds=0.25, error=None)
    found = json.loads(out.read_text())
    assert first["tables"] == {"table": [{"seconds": 0.5}]}
    assert found["tables"] == {"table": [{"seconds": 0.5}, {"seconds": 0.25, "error": None}]}
    assert found["settings"] == {"size": 3}
    assert found["machine"].keys() >= {"cpu", "cores", "threads", "memory_gib"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"python", "numpy"}
    assert found["commit"].keys() == {"hash", "is_dirty"}
    assert found["load"].keys() == {"before", "after"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.add("table", seconds=float("nan"))


def test_a_place_without_a_repository_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.commit() == {"hash": None, "is_dirty": None}


def test_turns_alternate_and_the_warm_up_does_not_count():
    order = []
    times = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, device=CPU, warmup=1, rounds=2, count=2
    )
    assert "".join(order) == "ab" + "aabb" * 2
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}


def test_seconds_are_those_of_each_call():
    ticks = iter([0.0, 1.0, 3.0])
    assert seconds_of(lambda: None, device=CPU, count=2, clock=lambda: next(ticks)) == [1.0, 2.0]
    assert spread([3.0, 1.0, 2.0]) == {"seconds": 2.0, "fastest": 1.0, "slowest": 3.0, "calls": 3}
    assert 0 < sustained(lambda: sum(range(1000)), device=CPU, seconds=0.01) < 0.01


def test_figures_of_tiny_shapes_are_not_written_unless_asked_for(tmp_path):
    assert result_file("step", GpuOptions()) == common.RESULTS / "step.json"
    assert result_file("step", GpuOptions(tiny=True)) is None
    assert result_file("step", GpuOptions(tiny=True, out=tmp_path / "x")) == tmp_path / "x"


def test_a_gpu_is_the_device_that_its_tensors_are_on(monkeypatch):
    """A device without a number is none of a tensor's: what compares the two would find none there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert common.find_device(GpuOptions()) == torch.device("cuda", 0) != torch.device("cuda")
    assert common.find_device(GpuOptions(device="cpu")) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("benchmark", [ceilings, fp8, kernels, step])
def test_without_a_gpu_nothing_is_measured_and_all_is_well(benchmark, capsys, tmp_path):
    out = tmp_path / "x.json"
    assert benchmark.main(["--out", str(out)]) == 0
    assert "there is no GPU here" in capsys.readouterr().out
    assert not out.exists()
