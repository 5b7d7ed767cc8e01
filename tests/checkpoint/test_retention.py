from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.checkpoint.folders import complete_steps
from megatron_aquila.checkpoint.retention import prune


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text("{}")


@given(steps=st.sets(st.integers(0, 10**8), min_size=1), keep=st.integers(1, 5))
def test_the_newest_stay(tmp_path_factory: pytest.TempPathFactory, steps: set[int], keep: int) -> None:
    root = tmp_path_factory.mktemp("prune")
    make(root, *(f"step_{step:07d}" for step in steps))
    removed = prune(root, keep)
    assert complete_steps(root) == sorted(steps)[-keep:]
    assert len(removed) == max(0, len(steps) - keep)
    assert prune(root, keep) == []


def test_latest_stays_and_leftovers_go(tmp_path: Path) -> None:
    make(tmp_path, "step_0000001", "step_0000002", "step_0000003", "step_0000003.old", "step_0000004.tmp")
    make(tmp_path, "step_0000009.old", "mine")
    (tmp_path / "latest").write_text("step_0000001\n")
    assert prune(tmp_path, 1) == [tmp_path / "step_0000002", tmp_path / "step_0000003"]
    left = ["latest", "mine", "step_0000001", "step_0000009.old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_an_abandoned_branch_goes_first(tmp_path: Path) -> None:
    """Back to step 100 with 200 and 300 there: what is saved from now on counts as the newest."""
    make(tmp_path, "step_0000100", "step_0000200", "step_0000300")
    left = []
    for step in (110, 120, 130):
        make(tmp_path, f"step_{step:07d}")
        (tmp_path / "latest").write_text(f"step_{step:07d}\n")
        prune(tmp_path, 2)
        left.append(complete_steps(tmp_path))
    assert left == [[100, 110], [110, 120], [120, 130]]


def test_nothing_is_kept_by_mistake_only(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="keep=0"):
        prune(tmp_path, 0)
