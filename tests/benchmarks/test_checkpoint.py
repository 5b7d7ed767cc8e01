import json

from benchmarks import checkpoint


def test_every_way_of_saving_has_its_row(tmp_path):
    out = tmp_path / "x.json"
    assert checkpoint.main(["--tiny", "--rounds", "1", "--out", str(out), "--folder", str(tmp_path)]) == 0
    rows = json.loads(out.read_text())["tables"]["saving"]
    assert len(rows) == 3
    assert all(0 < row["stall_seconds"] <= row["seconds"] for row in rows)
