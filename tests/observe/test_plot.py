from megatron_aquila.observe.plot import plot_log


def test_a_png_appears_whole(tmp_path):
    rows = [{"step": step, "loss": 9.0 / step, "lr": 1e-3, "tokens_per_second": 100.0} for step in (1, 2, 3)]
    rows[1]["valid_loss"] = 5.0
    path = tmp_path / "run.png"
    plot_log(rows, path, title="a run", marks={2: "resumed"})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


def test_a_log_without_throughput_is_drawn(tmp_path):
    plot_log([{"step": 1, "loss": 2.0}], tmp_path / "run.png", title="short")
    assert (tmp_path / "run.png").stat().st_size > 1000
