"""``aquila pretrain`` in one process: its folder, and how it is stopped."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_aquila.commands import doctor, pretrain
from megatron_aquila.train import env, run
from megatron_aquila.train.launcher import Launch
from megatron_aquila.train.lock import LOCK, take_lock
from megatron_aquila.train.stops import stop_on_signals
from tests.train.runs import VOCAB_SIZE, write_corpus

MORE_LAYERS = ["--num-layers", "2"]  # for two pipeline stages


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three steps of a tiny model that saves into ``tmp_path/run``."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{num_layers: 1, hidden_size: 16, num_heads: 2, ffn_size: 32, vocab_size: {VOCAB_SIZE}, vocab_multiple: 8,
  seq_len: 16}}
data: {{path: [{", ".join(map(repr, write_corpus(tmp_path)))}], split: "90,10,0", cache_path: {tmp_path / "cache"}}}
train: {{train_samples: 12, micro_batch: 2, global_batch: 4, precision: fp32, device: cpu, eval_iters: 1}}
checkpoint: {{save: {tmp_path / "run"}}}
"""
    )
    return ["--config", str(config)]


def test_a_run_leaves_its_folder_free_and_its_trail_ended(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    assert pretrain.main(flags) == 0
    folder = tmp_path / "run"
    assert (folder / LOCK).read_bytes() == b""
    assert doctor.main(["hang", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "1 of 1 ranks in step 3 (end)" in told
    assert "the run has ended in order" in told


@pytest.mark.parametrize(
    ("layout", "in_launch_order"),
    [
        ("", False),
        ("--zero 3", False),
        ("--tp 2", True),
        ("--cp 2", True),
        ("--tp 2 --zero 3", False),
        ("--pp 2", False),
    ],
)
def test_the_launch_order_is_kept_where_layers_are_split(
    flags: list[str], tmp_path: Path, layout: str, in_launch_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before CUDA starts; so is the folder of NCCL's traces said, beside the breadcrumbs."""
    launch, said = Launch(world_size=2), []

    def prepare(**settings: Any) -> None:
        said.append(settings)
        raise InterruptedError

    monkeypatch.setattr(env, "prepare_environment", prepare)
    monkeypatch.setattr(env, "choose_device", lambda *_: pytest.fail("CUDA has started"))
    for more, traces in (([], tmp_path / "run" / "breadcrumbs"), (["--no-breadcrumbs"], None)):
        with pytest.raises(InterruptedError), stop_on_signals() as stops:
            pretrain.run(pretrain.load([*flags, *MORE_LAYERS, *layout.split(), *more], launch), launch, stops)
        assert said.pop() == {"in_launch_order": in_launch_order, "traces": traces}


def test_the_wandb_run_has_the_name_of_the_flag(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, rows = [], []
    started = SimpleNamespace(log=lambda row, step: rows.append(step), finish=lambda: rows.append(None))
    wandb = SimpleNamespace(init=lambda **settings: began.append(settings) or started, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert pretrain.main([*flags, "--wandb-dir", str(tmp_path / "wandb"), "--wandb-exp-name", "first"]) == 0
    settings = {"project": "megatron_aquila", "name": "first", "dir": str(tmp_path / "wandb"), "mode": "online"}
    assert began == [settings]
    assert rows[0] == 1
    assert rows[-1] is None


def test_steps_are_not_recorded_where_no_gpu_is(flags: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pretrain.main([*flags, "--cuda-graph"]) != 0
    assert "--cuda-graph: the CPU launches no kernels" in capsys.readouterr().err
    assert pretrain.main([*flags, "--device", "auto", "--cuda-graph"]) != 0
    assert "--cuda-graph: no GPU is here; leave it out" in capsys.readouterr().err


def test_a_second_run_is_refused_before_it_writes_anything(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    held, _ = take_lock(tmp_path / "run")
    assert pretrain.main(flags) == 2
    assert f"a run is writing here: process {os.getpid()} on" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == [LOCK]
    held.release()


def test_a_signal_during_the_start_leaves_at_once_and_frees_the_folder(
    flags: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setattr(run, "build_machine", lambda *_, number=number: signal.raise_signal(number))
        assert pretrain.main(flags) == 128 + number
        assert (tmp_path / "run" / LOCK).read_bytes() == b""
        assert not (tmp_path / "run" / "latest").exists()
    assert "nothing to save" in capsys.readouterr().err


def test_a_stop_file_in_the_save_folder_stops_the_run_once(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert pretrain.main(flags) == 0
    assert f"stopped at step 0, 0 samples: {tmp_path / 'run' / 'stop'} was found" in capsys.readouterr().out
    assert pretrain.main(flags) == 0
    assert "stopped at step 3" in capsys.readouterr().out


def test_a_folder_that_cannot_hold_breadcrumbs_is_refused_and_they_can_be_left_out(
    flags: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "breadcrumbs").touch()
    assert pretrain.main(flags) == 2
    assert "or give --no-breadcrumbs" in capsys.readouterr().err
    assert pretrain.main([*flags, "--no-breadcrumbs"]) == 0
