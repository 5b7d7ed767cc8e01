"""Releases from a live run: two come out and load, and nothing that goes wrong with one ends the run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.conversion import content_of
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.retention import add_tag, tags
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train import releases
from megatron_aquila.train.releases import Releases
from tests.checkpoint.numbers import save_checkpoint
from tests.train.runs import Recorder, run, tiny_config

POPEN = subprocess.Popen


def releasing(folder: Path, every: int = 2, **checkpoint: object) -> RunConfig:
    config = tiny_config(folder, precision="bf16", eval_interval=0)
    return replace(config, checkpoint=replace(config.checkpoint, export_hf_every=every, **checkpoint))  # type: ignore[arg-type]


def outcomes(recorder: Recorder) -> list[tuple[str, str]]:
    return [(event["checkpoint"], event["outcome"]) for event in recorder.events if event["event"] == "export"]


def test_two_steps_are_released_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    recorder = run(replace(releasing(tmp_path, keep=1), train=replace(releasing(tmp_path).train, train_samples=32)))
    root = tmp_path / "run"
    assert outcomes(recorder) == [("step_0000002", "done"), ("step_0000004", "done")]
    for name in ("step_0000002", "step_0000004"):
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf" / name)
        assert model.config.vocab_size == 61
        assert "fp32 logits agree with transformers" in (root / "hf" / name / "README.md").read_text()
    assert [event["event"] for event in recorder.events][-1] == "stop"
    assert tags(root) == {}
    assert (root / "step_0000002").is_dir(), "retention left it while it was converted"


class Slow:
    """Stands in for a conversion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, code: int) -> None:
        self.commands: list[list[str]] = []

        def popen(command: list[str], **kwargs: object) -> object:
            self.commands.append(command)
            program = f"import sys, time; time.sleep({seconds}); sys.exit({code})"
            return POPEN([sys.executable, "-c", program], **kwargs)

        monkeypatch.setattr(releases.subprocess, "Popen", popen)


def test_one_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Slow(monkeypatch, 0, 3)
    recorder = run(releasing(tmp_path, every=4))
    assert outcomes(recorder) == [("step_0000004", "failed")]
    assert any("release of step_0000004" in note and "failed" in note for note in recorder.notes)
    assert started.commands[0][1:4] == ["-m", "megatron_aquila", "convert"]
    assert "--no-tokenizer" in started.commands[0]
    assert tags(tmp_path / "run") == {}
    assert recorder.events[-1]["failed"] is False


def test_a_run_that_is_stopped_leaves_it_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, 60, 0)
    recorder = run(releasing(tmp_path), kill_at=3)
    assert outcomes(recorder) == [("step_0000002", "stopped")]
    pinned = tags(tmp_path / "run")
    assert pinned["export-hf-step_0000002"] == "step_0000002"
    Slow(monkeypatch, 0, 0)
    again = run(releasing(tmp_path, resume=True))
    assert outcomes(again)[0] == ("step_0000002", "done")
    assert tags(tmp_path / "run") == {}


def test_what_cannot_begin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(releases.subprocess, "Popen", refuses)
    monkeypatch.setattr(releases, "find_spec", lambda name: None)
    recorder = run(releasing(tmp_path, every=4))
    assert any("step_0000004 is not released: no more processes" in note for note in recorder.notes)
    assert any("not compared" in note for note in recorder.notes)


def test_what_is_there_or_cannot_be_tagged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    root = tmp_path / "run"
    found = Releases(releasing(tmp_path), 0, recorder)
    found.saved(root / "step_0000004")
    assert "step_0000004 is not released" in recorder.notes[0]
    save(root, 2, 0.0)
    (root / "hf/step_0000002").mkdir(parents=True)
    found.saved(root / "step_0000002")
    assert "step_0000002 is not released: " in recorder.notes[1]
    assert "certificate.json" in recorder.notes[1], "a folder that is no release is nobody's to rename"
    (root / "hf/step_0000002/certificate.json").write_text('{"round_trip": "byte-equal"}')
    found.saved(root / "step_0000002")
    assert "hf/step_0000002 does not say of which weights it is; rename it" in recorder.notes[2]
    assert (root / "hf/step_0000002").is_dir(), "an older release stays"
    assert tags(root) == {}
    other = Releases(releasing(tmp_path), 1, recorder)
    other.saved(root / "step_0000004")
    other.begin()
    assert len(recorder.notes) == 3


def save(root: Path, step: int, value: float) -> Path:
    """A checkpoint of one weight."""
    weight = Chunk("a.weight", (4,), (0,), torch.full((4,), value))
    return save_checkpoint(root, step, [weight], {}, ParallelContext.single())


def released(folder: Path, checkpoint: Path) -> None:
    """As ``aquila convert`` leaves it."""
    folder.mkdir(parents=True)
    certificate = {"content": content_of(CheckpointReader(checkpoint))}
    (folder / "certificate.json").write_text(json.dumps(certificate))


def test_a_whole_release_whose_tag_was_not_taken_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion gave the folder its name, and the run was killed before it knew."""
    started, recorder, root = Slow(monkeypatch, 0, 0), Recorder(), tmp_path / "run"
    checkpoint = save(root, 2, 1.0)
    released(root / "hf/step_0000002", checkpoint)
    add_tag(checkpoint, "export-hf-step_0000002")
    Releases(releasing(tmp_path), 0, recorder).begin()
    assert started.commands == []
    assert any("is a whole release of step_0000002" in note for note in recorder.notes)
    assert outcomes(recorder) == []
    assert tags(root) == {}


def test_a_release_of_an_abandoned_branch_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run went back and came to the same step with other weights."""
    started, recorder, root = Slow(monkeypatch, 0, 0), Recorder(), tmp_path / "run"
    before = save(root, 2, 1.0)
    released(root / "hf/step_0000002", before)
    old = content_of(CheckpointReader(before))
    releases_ = Releases(releasing(tmp_path), 0, recorder)
    releases_.saved(save(root, 2, 2.0))
    assert [command[7] for command in started.commands] == [str(root / "hf/step_0000002")]
    assert (root / f"hf/step_0000002.of-{old[:12]}/certificate.json").is_file()
    assert any("abandoned branch" in note for note in recorder.notes)
    releases_.wait(lambda: False)
    assert outcomes(recorder) == [("step_0000002", "done")]
    assert tags(root) == {}


def test_a_tag_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object) -> None:
        raise OSError("read-only")

    Slow(monkeypatch, 0, 0)
    monkeypatch.setattr(releases, "remove_tag", refuses)
    recorder = run(releasing(tmp_path, every=4))
    assert any("keeps its tag: read-only" in note for note in recorder.notes)
    assert add_tag(tmp_path / "run", "still-works").name == "step_0000006"
