import pytest
from rich.console import Console

from megatron_aquila.commands import config
from megatron_aquila.config.migration_page import migration_page


def test_show_prints_every_setting_with_its_source(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("preset: aquila2-34b\noptim: {lr: 1e-4}\n")
    assert config.main(["show", "--world-size", "64", "--config", f"{tmp_path}/run.yaml", "--mbs", "2"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "parallel.tensor 4 preset aquila2-34b" in lines
    assert f"optim.lr 0.0001 file {tmp_path}/run.yaml:2" in lines
    assert "train.micro_batch 2 flag --mbs" in lines
    assert "parallel.context 1 default" in lines
    assert "ranks 64 = tp 4 x cp 1 x dp 4 x pp 4, sequence parallel" in lines


def test_show_without_a_world_size_plans_for_the_fewest_ranks(capsys):
    assert config.main(["show", "--preset", "aquila2-34b"]) == 0
    out = capsys.readouterr().out
    assert "what follows, on the fewest ranks:" in out
    assert "16 = tp 4 x cp 1 x dp 1 x pp 4" in out


def test_show_names_what_training_would_still_need(capsys):
    assert config.main(["show", "--preset", "aquila2-7b-continue"]) == 0
    _, found, needed = capsys.readouterr().out.partition("to train, give also:\n")
    assert found
    assert [line.split()[0] for line in needed.splitlines()] == ["--data-path", "--preset"]
    assert config.main(["show", "--data-path", "a"]) == 0
    assert "to train" not in capsys.readouterr().out


def test_show_draws_tables_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(config, "Console", lambda **settings: Console(force_terminal=True, width=120, **settings))
    assert config.main(["show", "--save", "[red]"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint.save" in out
    assert "[red]" in out
    assert "─" in out


def test_problems_end_the_command(capsys):
    assert config.main(["show", "--tp", "3", "--pp", "7", "--world-size", "4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("2 settings cannot run:\n  --tp 3: num_heads 32, ")


def test_from_megatron_prints_the_page(capsys):
    assert config.main(["from-megatron"]) == 0
    assert capsys.readouterr().out == migration_page()


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["sow"], 2), (["--help"], 0)])
def test_usage(argv, status, capsys):
    assert config.main(argv) == status
    captured = capsys.readouterr()
    assert "aquila config show" in captured.out + captured.err
