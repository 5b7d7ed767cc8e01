"""A file is written beside its own name, in this process alone."""

import os
from pathlib import Path

from megatron_aquila.data.temporary import temporary_path


def test_our_own_name(tmp_path: Path) -> None:
    assert temporary_path(tmp_path / "out", "idx") == tmp_path / f"out.idx.{os.getpid()}.tmp"
