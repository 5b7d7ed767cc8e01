from pathlib import Path

import pytest
import torch

from megatron_aquila.commands.ckpt import main
from megatron_aquila.parallel.context import ParallelContext
from tests.checkpoint.numbers import FILE, flip, numbers, save_checkpoint, save_numbers


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save_numbers(tmp_path, step, float(step))
    return tmp_path


def test_list(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tag", str(root / "step_0000010"), "first"]) == 0
    assert "tags/first is removed" in capsys.readouterr().out
    assert main(["list", str(root)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "0000" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["0000010", "0000020", "0000030"]
    assert "10,000" in lines[0]
    assert "first" in lines[0]
    assert "latest" in lines[2]
    assert all("whole" in line for line in lines)
    (root / "step_0000020" / FILE).write_bytes(b"")
    assert main(["list", str(root)]) == 1
    assert "it has 0 bytes instead of" in capsys.readouterr().out
    assert main(["list", str(root / "step_0000030")]) == 0
    assert main(["list", str(root / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_show(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "weight" in printed
    assert "step 30, saved 20" in printed
    assert '"consumed_samples": 30000' in printed


def test_verify(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(root), str(root / "step_0000010")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok"]
    flip(root / "step_0000020" / FILE, -1)
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(root), "--all"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "rank_00000.safetensors: it is damaged" in printed
    assert main(["verify", str(root / "nowhere")]) == 2


def test_diff(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(root), str(root / "step_0000030")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["diff", str(root / "step_0000010"), str(root)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "step: 10 -> 30",
        "train.consumed_samples: 10000 -> 30000",
        "value: 10.0 -> 30.0",
        "weight: max |difference| 20, 6 of 6 elements differ",
    ]
    chunks = numbers(10.0)
    chunks[0].tensor[2] = torch.nan
    save_checkpoint(root, 40, [chunks[0]], {"value": [10.0]}, ParallelContext.single())
    assert main(["diff", str(root / "step_0000010"), str(root)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "step: 10 -> 40",
        "train.consumed_samples: 10000 -> nothing",
        "value: 10.0 -> [10.0]",
        "other: [2, 2] float32 -> nothing",
        "weight: max |difference| nan, 1 of 6 elements differ",
    ]


def test_prune(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", str(root), "--keep", "1", "--every", "20"]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"would remove {root / 'step_0000010'}" in capsys.readouterr().out
    assert (root / "step_0000010").exists()
    assert main(arguments) == 0
    assert sorted(path.name for path in root.glob("step_*")) == ["step_0000020", "step_0000030"]
    assert main(["prune", str(root), "--keep", "0"]) == 2
    assert main(["prune", str(root / "nowhere"), "--keep", "1"]) == 2


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == main(["forget"]) == main(["list"]) == main(["diff", "a"]) == 2
    assert "usage: aquila ckpt list" in capsys.readouterr().err
