"""The loop's own decisions; whole runs are in test_resume.py."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_aquila.config.saving import CheckpointConfig
from megatron_aquila.config.schema import RunConfig, TrainConfig
from megatron_aquila.errors import AquilaError
from megatron_aquila.optim.clip import Clip
from megatron_aquila.train import faults, stops, trainer
from megatron_aquila.train.state import TrainState
from tests.train.runs import run, tiny_config


def test_things_are_due_at_their_interval_and_at_the_end() -> None:
    assert [number for number in range(1, 8) if trainer.is_due(number, 3, last=number == 7)] == [3, 6, 7]
    assert not trainer.is_due(7, 0, last=True)


def test_the_ramp_has_its_own_save_interval() -> None:
    config = RunConfig(
        train=TrainConfig(rampup_batch=(2, 2, 100)),
        checkpoint=CheckpointConfig(save_interval=10, rampup_save_interval=50),
    )
    early = TrainState(seed=1, index_segments=(1000,), consumed_samples=99)
    assert trainer.save_interval(config, early) == 50
    assert trainer.save_interval(config, replace(early, consumed_samples=100)) == 10


def test_time_that_is_up_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 30))  # 30 s a step: two minutes are over before the sixth
    monkeypatch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    config = tiny_config(tmp_path, exit_minutes=2, train_samples=400, eval_interval=0)
    recorder = run(config)
    assert len(recorder.reports) == 4
    assert "--exit-minutes" in recorder.notes[-1]
    assert any("step_0000004" in note for note in recorder.notes)


def test_a_step_that_is_not_finite_is_skipped_and_twenty_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "MAX_NOT_APPLIED", 3)
    monkeypatch.setattr(Clip, "at", lambda norm, *_, **__: Clip(norm, norm, torch.tensor(False)))
    config = tiny_config(tmp_path)
    with pytest.raises(AquilaError, match=r"samples 0 to 24.*lower --lr"):
        run(config)


def test_fp16_finds_its_loss_scale_and_then_learns(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=160)
    config = replace(config, train=replace(config.train, precision="fp16"))
    optim = replace(config.optim, initial_loss_scale=2.0**26, loss_scale_window=4)
    reports = run(replace(config, optim=optim)).reports
    skipped = [report for report in reports if not report.applied]
    assert skipped
    assert reports[0].loss_scale == reports[1].loss_scale == 2 * reports[2].loss_scale == 2.0**26
    assert all(report.lr > 0 for report in skipped[1:]), "the learning rate goes on with the samples"
    scales = [report.loss_scale for report in reports]
    assert any(after > before for before, after in itertools.pairwise(scales)), scales
    assert reports[-1].applied or reports[-2].applied
    assert reports[-1].loss < reports[0].loss


def test_without_a_save_folder_the_run_says_that_nothing_was_kept(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16)
    recorder = run(replace(config, checkpoint=CheckpointConfig()))
    assert "nothing was saved" in recorder.notes[-1]


def test_batch_ramp_changes_the_microbatches_and_the_pipeline_follows(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rampup_batch=(4, 2, 24))
    reports = run(config).reports
    sizes = [report.global_batch for report in reports]
    assert sizes[0] == 4
    assert sizes[-1] == 8
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
