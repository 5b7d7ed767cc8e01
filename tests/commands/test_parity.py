from dataclasses import replace
from pathlib import Path

import pytest

from megatron_aquila.commands import parity
from megatron_aquila.config.cli import with_config_flag
from megatron_aquila.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.verify.observe import Observation
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.shrink import Layout

ARGUMENTS = ["--num-layers", "8", "--hidden-size", "64", "--num-heads", "4", "--global-batch", "8"]


def test_it_prints_a_row_an_axis_and_exits_0(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 8, hidden_size: 64, num_heads: 4}\ntrain: {global_batch: 8}\n")
    assert parity.main([str(path), "--pp", "2"]) == 0
    out = capsys.readouterr().out
    assert "bit for bit" in out
    assert "all together" not in out, "pp alone is all there is"
    assert "FAILS" not in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run --tp 2", "--config run --tp 2"),
        ("--tp 2 run.yaml --sp", "--tp 2 --config run.yaml --sp"),
        ("--sp run.yml", "--sp --config run.yml"),
        ("--data-path a b run.yaml", "--data-path a b --config run.yaml"),
        ("--config run.yaml", "--config run.yaml"),
        ("--config=run.yaml --tp 2", "--config=run.yaml --tp 2"),
        ("", ""),
    ],
)
def test_the_config_may_stand_anywhere(words: str, expected: str) -> None:
    assert with_config_flag(words.split()) == expected.split()


def test_help_has_a_usage_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parity.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: aquila parity [CONFIG.yaml] ")


def test_a_layout_of_one_process_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parity, "observe", lambda self, layout: self.plain)
    assert parity.main(ARGUMENTS) == 0
    assert capsys.readouterr().out.startswith("warning: no axis is above 1")
    assert parity.main([*ARGUMENTS, "--dp", "2"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_wrong_layout_exits_1_and_names_tensor_and_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Parity, layout: Layout) -> Observation:
        wrong = {name: value * (2 if "q_proj" in name else 1) for name, value in self.plain.gradients.items()}
        return replace(self.plain, gradients=wrong) if layout.micro_batch > 1 else self.plain

    monkeypatch.setattr(Parity, "observe", broken)
    assert parity.main([*ARGUMENTS, "--micro-batch", "2"]) == 1
    out = capsys.readouterr().out
    assert "first wrong tensor is gradient of model.layers.0.self_attn.q_proj.weight" in out
    assert "smallest layout that fails is tp 1 pp 1 dp 1 mbs 2" in out


def test_the_settings_say_what_is_asked_for() -> None:
    config = RunConfig(parallel=ParallelConfig(tensor=2, data=3, sequence=True), train=TrainConfig(micro_batch=4))
    assert parity.requested_layout(config) == Layout(tp=2, sequence=True, dp=3, micro_batch=4)
    alone = replace(config, parallel=ParallelConfig(sequence=True))
    assert not parity.requested_layout(alone).sequence


def test_wrong_settings_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--tp", "5"]) == 2
    assert "--tp 5" in capsys.readouterr().err
