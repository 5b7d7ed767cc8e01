"""Long work says how far it is, short work nothing."""

from pathlib import Path

import numpy as np

from megatron_aquila.data.blend import build_datasets
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.data.progress import counting, lines


def test_counts_become_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    count = counting(lambda *said: seen.append(said), "documents", 9)
    count(4)
    count(5)
    assert seen == [("documents", 4, 9), ("documents", 9, 9)]


def test_lines() -> None:
    written: list[str] = []
    lines(written.append)("a: documents", 1, 2)
    assert written == []
    report = lines(written.append, every_seconds=0)
    report("a: documents", 1000, 2000)
    report("nothing", 0, 0)
    assert written == ["a: documents: 1,000 of 2,000, 50%", "nothing: 0 of 0, 0%"]


def test_a_build_reports(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.arange(90), np.full(9, 10))
    seen: list[tuple[str, int, int]] = []
    path = str(tmp_path / "data")
    for _ in range(2):
        build_datasets(
            [path],
            sizes=(4, 0, 0),
            split="1",
            seq_len=8,
            seed=1,
            cache_path=None,
            report=lambda *said: seen.append(said),
        )
    assert [what for what, _, _ in seen] == [
        f"{path} (train): {part}" for part in ("documents", "documents", "samples", "order of samples")
    ], "once: the second time the index is there"
