import json
from pathlib import Path

import pytest

from benchmarks import convert
from megatron_aquila.checkpoint.published import open_weights
from megatron_aquila.commands.convert import main


def test_every_conversion_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where nothing is to be measured."""

    def here(source: Path, output: Path, *flags: str, stop: object = None) -> dict[str, float]:
        if stop is None:
            assert main(["--from", str(source), "--to", str(output), "--no-verify", *flags]) == 0
        return {"seconds": 1.0, "own_bytes": 2}

    monkeypatch.setattr(convert, "measured", here)
    out = tmp_path / "x.json"
    assert convert.main(["--tiny", "--shard-size", "5MB", "--out", str(out), "--folder", str(tmp_path)]) == 0
    rows = json.loads(out.read_text())["tables"]["converting"]
    assert len(rows) == 6
    assert rows[-2]["name"].endswith("killed at the second file")


def test_a_conversion_is_killed_and_one_that_fails_is_said(tmp_path: Path) -> None:
    shape = convert.shape_of(convert.Options(tiny=True))
    assert convert.publish(tmp_path / "in", shape) > 10**6
    assert len(open_weights(tmp_path / "in").tensors) == 3 + 9 * shape.num_layers
    found = convert.measured(tmp_path / "in", tmp_path / "out", stop=lambda _: True)
    assert found["seconds"] > 0
    assert not (tmp_path / "out").exists()
    assert not convert.has_one_file(tmp_path / "out")
    with pytest.raises(AssertionError, match="no such folder"):
        convert.measured(tmp_path / "nowhere", tmp_path / "out")
