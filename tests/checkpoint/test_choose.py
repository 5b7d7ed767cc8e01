"""A damaged or lost checkpoint costs the steps since the one before it, never the run; and it is said aloud."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.choose import choose
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.numbers import FILE, flip, save_numbers

Pool = Callable[[int], WorkerPool]


def chosen(path: Path, *, falls_back: bool = True) -> tuple[str, list[str]]:
    """The step's name and the warnings, on this rank."""
    lines: list[str] = []
    ctx = ParallelContext.create(RankGrid(dp=torch.distributed.get_world_size()), torch.device("cpu"))
    return choose(path, ctx.world, falls_back=falls_back, warn=lines.append).name, lines


def alone(path: Path, *, falls_back: bool = True) -> tuple[str, str]:
    lines: list[str] = []
    name = choose(path, ParallelContext.single().world, falls_back=falls_back, warn=lines.append).name
    return name, "\n".join(lines)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save_numbers(tmp_path, step, float(step))
    return tmp_path


def test_the_latest_if_it_is_whole(root: Path) -> None:
    assert alone(root) == ("step_0000003", "")
    assert alone(root / "step_0000001") == ("step_0000001", "")


def test_the_one_before_a_damaged_one_on_all_ranks(root: Path, pool: Pool) -> None:
    flip(root / "step_0000003" / FILE, -1)
    flip(root / "step_0000002" / "manifest.json", 200)
    outcomes = pool(2).run(chosen, root)
    assert [name for name, _ in outcomes] == ["step_0000001"] * 2
    warnings = outcomes[0][1]
    assert "DAMAGED CHECKPOINT" in warnings[0]
    assert "step_0000003/rank_00000.safetensors: it is damaged" in warnings[0]
    assert warnings[0].endswith("step_0000002")
    assert "step_0000002/manifest.json: it is damaged" in warnings[1]


def test_what_is_passed_over_is_told_with_the_reason(root: Path) -> None:
    flip(root / "step_0000003" / FILE, -1)
    told: list[tuple[str, str]] = []
    choose(
        root,
        ParallelContext.single().world,
        falls_back=True,
        warn=lambda text: None,
        passed_over=lambda folder, reason: told.append((folder.name, reason)),
    )
    ((name, reason),) = told
    assert name == "step_0000003"
    assert "it is damaged" in reason


def test_stop_means_stop_and_a_named_step_is_never_replaced(root: Path) -> None:
    flip(root / "step_0000003" / FILE, -1)
    for path, falls_back in ((root, False), (root / "step_0000003", True)):
        with pytest.raises(CheckpointError, match=r"step_0000003/.*it is damaged"):
            alone(path, falls_back=falls_back)


def test_where_all_are_damaged_the_last_error_is_raised(root: Path) -> None:
    for step in (1, 2, 3):
        flip(root / f"step_000000{step}" / FILE, -1)
    with pytest.raises(CheckpointError, match=r"step_0000001/.*it is damaged"):
        alone(root)


def test_never_forward_to_what_was_abandoned(root: Path) -> None:
    """Training went back to step 1 and saved 2 again; 3 is of the way that was left."""
    save_numbers(root, 2, 2.5)
    flip(root / "step_0000002" / FILE, -1)
    assert alone(root)[0] == "step_0000001"


@pytest.mark.parametrize("latest", [None, "", "step_000", "\x00\xff", "step_0000009"])
def test_a_lost_latest_is_the_newest_by_the_time_it_was_saved(latest: str | None, root: Path) -> None:
    save_numbers(root, 2, 2.5)
    (root / "latest").unlink()
    if latest is not None:
        (root / "latest").write_text(latest, encoding="latin-1")
    name, warning = alone(root)
    assert name == "step_0000002"
    assert "LOST `latest`" in warning
    assert warning.endswith("step_0000002")
    flip(root / "step_0000002" / FILE, -1)
    assert alone(root)[0] == "step_0000003"
    with pytest.raises(CheckpointError, match="latest"):
        alone(root, falls_back=False)


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no save has finished here"):
        alone(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no such folder; .* give --resume instead"):
        alone(tmp_path / "nowhere")


def test_a_step_that_is_gone_counts_as_lost(root: Path) -> None:
    shutil.rmtree(root / "step_0000003")
    assert alone(root)[0] == "step_0000002"
