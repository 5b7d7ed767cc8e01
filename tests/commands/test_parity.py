import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_aquila.commands import parity
from megatron_aquila.config.cli import with_config_flag
from megatron_aquila.verify import matrix
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.matrix import MatrixCase
from megatron_aquila.verify.observe import Observation
from megatron_aquila.verify.parity import Parity

ARGUMENTS = ["--num-layers", "8", "--hidden-size", "64", "--num-heads", "4", "--global-batch", "8"]


def test_it_prints_a_row_an_axis_and_exits_0(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 8, hidden_size: 64, num_heads: 4}\ntrain: {global_batch: 8}\n")
    assert (
        parity.main(
            [str(path), "--pp", "2", "--no-overlap", "--no-fuse-main-grads", "--json", str(tmp_path / "rows.json")]
        )
        == 0
    )
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["holds"] is True
    assert [row["axis"] for row in found["rows"]][:3] == ["world of one", "pp", "pp"]
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
    assert "first wrong tensor is gradient of model.layers.1.self_attn.q_proj.weight" in out
    assert "fewest options that fail: mbs 2" in out


def test_wrong_settings_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--tp", "5"]) == 2
    assert "--tp 5" in capsys.readouterr().err


def test_the_matrix_is_put_into_a_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = tuple(MatrixCase(layout=Layout(micro_batch=size), documents=size == 2) for size in (1, 2))
    monkeypatch.setattr(matrix, "matrix_cases", lambda: cases)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- matrix: aquila parity -->\n<!-- /matrix -->\nafter\n")
    assert parity.main(["--matrix", "--markdown", str(page), "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("holds") == 2
    assert "mbs 2 documents apart" in out
    assert "| 2 cases, 0 failures" not in page.read_text()
    assert "2 cases, 0 failures" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert json.loads((tmp_path / "rows.json").read_text())["holds"] is True


def test_a_page_and_a_file_are_asked_for_before_anything_is_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "no" / "rows.json")
    assert parity.main(["--json", nowhere, "--markdown", str(tmp_path / "page.md")]) == 2
    text = capsys.readouterr().err
    assert f"--json {nowhere}: its folder does not exist; make the folder first" in text
    assert "only --matrix makes a table for a page; give --matrix" in text
    assert "there is no such page" in text
