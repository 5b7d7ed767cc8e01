"""What a dead process left is removed; what a living one writes, or another prefix owns, is not."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_aquila.data.temporary import remove_leftovers, temporary_path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers(tmp_path: Path) -> None:
    dead, alive, ours = dead_pid(), os.getppid(), os.getpid()
    names = [f"out.bin.{dead}.tmp", f"out.idx.{dead}.tmp", f"out.manifest.json.{dead}.tmp", f"out.bin.{10**30}.tmp"]
    kept = [f"out.bin.{alive}.tmp", f"out.idx.{ours}.tmp", f"out2.bin.{dead}.tmp", f"out.bin.{dead}.tmp2", "out.bin"]
    for name in names + kept:
        (tmp_path / name).write_text("")
    (tmp_path / f"out.x.{dead}.tmp").mkdir()
    assert sorted(path.name for path in remove_leftovers(tmp_path / "out")) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, f"out.x.{dead}.tmp"])
    assert remove_leftovers(tmp_path / "out") == []
    assert remove_leftovers(tmp_path / "nowhere" / "out") == []


def test_a_prefix_is_not_a_pattern(tmp_path: Path) -> None:
    dead = dead_pid()
    (tmp_path / f"a.bin.{dead}.tmp").write_text("")
    assert remove_leftovers(tmp_path / "[a]") == []


def test_our_own_name(tmp_path: Path) -> None:
    assert temporary_path(tmp_path / "out", "idx") == tmp_path / f"out.idx.{os.getpid()}.tmp"
