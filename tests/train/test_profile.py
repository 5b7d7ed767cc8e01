"""A run with ``--profile-steps`` leaves a trace and says what is in it."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.train import profile
from tests.train.runs import run, tiny_config


def profiled(folder: Path, steps: str, **train: str) -> RunConfig:
    config = tiny_config(folder, train_samples=32, eval_interval=0, **train)
    return replace(config, observe=replace(config.observe, profile_steps=steps))


def test_the_steps_leave_a_trace_and_a_summary(tmp_path: Path) -> None:
    config = profiled(tmp_path, "3-4")
    found = run(config)
    path = tmp_path / "run" / "profile" / "rank-0-steps-3-4.json.gz"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    updates = [
        event["dur"] for event in events if (event["name"], event.get("cat")) == ("optimizer", "user_annotation")
    ]
    assert len(updates) == 2
    summary = next(note for note in found.notes if note.startswith("profile of 2 steps"))
    seen = profile.read_profile(path)
    shares = seen.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["GEMM"] > 0
    assert shares["optimizer"] == pytest.approx(sum(updates) / seen.wall), "the C++ update is no operator of torch's"
    assert len([name for name, *_ in seen.largest() if name in summary]) == 10


def test_a_run_that_ends_earlier_writes_what_it_has(tmp_path: Path) -> None:
    config = profiled(tmp_path, "2-4")
    config = replace(config, train=replace(config.train, exit_samples=24))
    assert any("steps-2-3.json.gz" in note for note in run(config).notes)


def test_other_ranks_profile_nothing(tmp_path: Path) -> None:
    config = profiled(tmp_path, "1-2")
    run(replace(config, observe=replace(config.observe, profile_ranks=(1,))))
    assert not (tmp_path / "run" / "profile").exists()


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file where the folder should be")
    found = run(profiled(tmp_path, "1-1"))
    assert len(found.reports) == 4
    assert any("could not be written" in note for note in found.notes)


def test_a_trace_that_is_not_understood_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank: the others would wait for it."""
    right = profile.write_trace

    def torn(profiler: torch.profiler.profile, path: Path) -> Path:
        with gzip.open(right(profiler, path), "wt") as file:
            file.write('{"traceEvents": [')
        return path

    monkeypatch.setattr(profile, "write_trace", torn)
    found = run(profiled(tmp_path, "1-1"))
    assert len(found.reports) == 4
    assert any("rank-0-steps-1-1.json.gz\n  it is not understood here: JSONDecodeError" in note for note in found.notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_kernels_are_counted_and_the_update_s_are_known(tmp_path: Path) -> None:
    found = run(profiled(tmp_path, "3-4", device="cuda", precision="bf16"))
    seen = profile.read_profile(tmp_path / "run" / "profile" / "rank-0-steps-3-4.json.gz")
    shares = seen.shares()
    assert seen.is_device
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[part] for part in ("GEMM", "attention", "optimizer", "memory-bound", "idle")) > 0, shares
    assert [report.step for report in found.reports] == [1, 2, 3, 4]
    told = sum(report.seconds for report in found.reports[2:])
    assert 0.5 * told < seen.wall / 1e6 < 2 * told + 0.1
