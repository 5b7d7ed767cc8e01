"""Whole runs by their command line, and what their ledger says."""

from pathlib import Path

import pytest

from megatron_aquila.commands import ledger, pretrain
from megatron_aquila.observe.ledger import LEDGER_NAME, read_ledger
from tests.train.runs import VOCAB_SIZE, write_corpus

MODEL = "--num-layers 1 --hidden-size 16 --num-heads 2 --ffn-size 16 --seq-len 16 --device cpu --precision fp32"
BATCH = "--gbs 8 --train-samples 48 --eval-interval 0 --split 1 --save-interval 2"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    words = f"{MODEL} {BATCH} --vocab-size {VOCAB_SIZE} --data-cache-path {tmp_path / 'cache'}".split()
    return [*words, "--save", str(tmp_path / "run"), "--load", "auto", "--data-path", *write_corpus(tmp_path)]


def test_a_run_its_stop_and_its_resume_by_one_command(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main([*arguments, "--exit-samples", "24", "--skip-samples", "3-4", "40-47"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'run'} holds no checkpoint yet: starts afresh" in out
    (saved,) = [line for line in out.splitlines() if line.startswith("the next samples, 24-")]
    assert pretrain.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"resumes from {tmp_path / 'run' / 'step_0000003'} at step 3, 24 samples" in out
    assert f"{saved}, as in the checkpoint" in out

    assert ledger.main([str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "lineage: step_0000002 > step_0000003 > step_0000004 > step_0000006" in out
    assert "samples in step_0000006: 0-47; skipped: 3-4 40-47" in out
    assert "2 starts, 0 ended without a stop, 0 rewinds, 0 fallbacks" in out
    assert out.splitlines()[-1] == "nothing is wrong"
    events = read_ledger(tmp_path / "run")
    starts = [event for event in events if event["event"] == "start"]
    assert starts[0]["run"] == starts[1]["run"] != ""
    assert starts[0]["config"]["train.skip_samples"] == ["3-4", "40-47"]
    assert starts[1]["checkpoint"]["name"] == "step_0000003"
    assert starts[0]["data"]["seq_len"] == 16
    assert ledger.main([str(tmp_path / "run"), "--events"]) == 0


def test_a_ledger_that_tells_of_a_loss_is_status_1(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(arguments) == 0
    path = tmp_path / "run" / LEDGER_NAME
    path.write_text(path.read_text().replace('"ranges": [[32, 48]]', '"ranges": [[33, 48]]'))
    capsys.readouterr()
    assert ledger.main([str(tmp_path / "run")]) == 1
    assert "WRONG: step_0000006: samples 32 to 33 were never taken" in capsys.readouterr().out
    assert ledger.main([str(tmp_path / "nowhere")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_changed_data_is_refused_by_its_digest_unless_it_is_meant(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main([*arguments, "--exit-samples", "16"]) == 0
    for path in tmp_path.glob("*.bin"):
        tokens = bytearray(path.read_bytes())
        tokens[::2] = bytes((token + 1) % VOCAB_SIZE for token in tokens[::2])  # the headers stay as they are
        path.write_bytes(tokens)
    capsys.readouterr()
    assert pretrain.main(arguments) == 2
    err = capsys.readouterr().err
    assert "the next samples, 16-47: digest" in err
    assert "--override-data" in err
    assert pretrain.main([*arguments, "--override-data"]) == 0


def test_a_run_that_was_killed_before_its_first_save_keeps_its_name(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LEDGER_NAME).write_text(
        '{"event": "start", "time": "2026-01-01T00:00:00", "run": "abc", "origin": "fresh", "checkpoint": null, '
        '"samples": 0, "layout": {"tp": 1}, "world": 1, "version": "0", "commit": null}\n{"event": "torn'
    )
    assert pretrain.main([*arguments, "--exit-samples", "8"]) == 0
    assert [event["run"] for event in read_ledger(folder) if event["event"] == "start"] == ["abc", "abc"]
    assert ledger.main([str(folder)]) == 0
    assert "2 starts, 1 ended without a stop" in capsys.readouterr().out
