import re
import sys

import pytest

from megatron_aquila.errors import DataError
from megatron_aquila.observe.plot import SETS, plot_lengths, plot_log, plot_positions


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


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_lengths_are_drawn(tmp_path, ending, magic):
    sets = {"a": [(0, 0, 3, 0), (1, 1, 2, 2)], "empty": []}
    sets |= {f"set {number}": [(2, 3, number, 2 * number)] for number in range(SETS)}
    path = tmp_path / f"lengths.{ending}"
    plot_lengths(sets, path, title="lengths")
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]
    if ending == "svg":
        drawn = path.read_text()
        assert f"the {SETS} largest of {SETS + 2} sets" in drawn
        assert "set 9 (18 tokens)" in drawn
        assert "empty" not in drawn


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"needs the matplotlib package: pip install 'megatron_aquila\[plots\]'"):
        plot_lengths({}, tmp_path / "x.png", title="")


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(DataError, match=r"x.png: cannot be written: Is a directory"):
        plot_lengths({"a": [(1, 1, 2, 2)]}, tmp_path / "x.png", title="")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]


def test_perplexity_by_position_is_drawn(tmp_path):
    curves = {
        name: [{"first": 8 * n, "last": 8 * n + 7, "perplexity": 300.0 + 50 * n * k} for n in range(2)]
        for k, name in enumerate(("a", "b"))
    }
    path = tmp_path / "positions.svg"
    plot_positions(curves, path, title="positions", trained_len=8)
    assert path.read_bytes().startswith(b"<?xml")
    assert list(tmp_path.iterdir()) == [path]
    drawn = re.findall(r"<!-- (.*?) -->", path.read_text())
    assert {"perplexity", "share of that of “a”", "300", "350", "trained on 8 tokens"} <= {*drawn}
