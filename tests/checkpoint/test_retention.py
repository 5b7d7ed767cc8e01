from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.checkpoint.folders import complete_steps
from megatron_aquila.checkpoint.retention import add_tag, prune, superfluous, tags
from megatron_aquila.errors import CheckpointError


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


def test_every_nth_and_tagged_ones_stay_for_ever(tmp_path: Path) -> None:
    make(tmp_path, *(f"step_{step:07d}" for step in range(10, 110, 10)))
    (tmp_path / "latest").write_text("step_0000100\n")
    add_tag(tmp_path / "step_0000020", "before-anneal")
    add_tag(tmp_path, "end")
    assert tags(tmp_path) == {"before-anneal": "step_0000020", "end": "step_0000100"}
    going = superfluous(tmp_path, 2, every=50)
    assert complete_steps(tmp_path) == [*range(10, 110, 10)], "nothing was removed yet"
    assert prune(tmp_path, 2, every=50) == going
    assert complete_steps(tmp_path) == [20, 50, 90, 100]
    (tmp_path / "tags" / "before-anneal").unlink()
    prune(tmp_path, 1)
    assert complete_steps(tmp_path) == [100]


def test_a_tag_is_one_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, "step_0000001", "step_0000002")
    add_tag(tmp_path / "step_0000001", "v1.0")
    assert add_tag(tmp_path / "step_0000001", "v1.0") == tmp_path / "step_0000001"
    with pytest.raises(CheckpointError, match=r"tags/v1\.0: step_0000001 has this tag"):
        add_tag(tmp_path / "step_0000002", "v1.0")
    for name in ("../up", "", ".hidden", "a b", "x.tmp"):
        with pytest.raises(CheckpointError, match="is no tag"):
            add_tag(tmp_path / "step_0000001", name)


def test_leftovers_are_for_the_owner(tmp_path: Path) -> None:
    make(tmp_path, "step_0000001", "step_0000002.tmp")
    prune(tmp_path, 1, leftovers=False)
    assert (tmp_path / "step_0000002.tmp").exists()
    prune(tmp_path, 1)
    assert not (tmp_path / "step_0000002.tmp").exists()
