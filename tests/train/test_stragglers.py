"""A slow rank is named, whatever the others wait, and noise names nobody."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.observe.log import step_line
from megatron_aquila.train import step as stepping
from megatron_aquila.train.stragglers import Comparison, compare
from tests.train.runs import run, split, tiny_config


@given(st.integers(3, 40), st.data())
def test_one_slow_rank_is_named_and_noise_is_not(world: int, data: st.DataObject) -> None:
    noise = data.draw(st.lists(st.floats(0.95, 1.05), min_size=world, max_size=world))
    assert compare(noise, [0] * world).slow == ()
    culprit = data.draw(st.integers(0, world - 1))
    seconds = [3.0 if rank == culprit else own for rank, own in enumerate(noise)]
    found = compare(seconds, [0] * world)
    assert found.slow == (culprit,)
    assert found.slowest_rank == culprit
    assert found.slowest_seconds == 3.0


def test_a_heavier_stage_is_no_straggler_but_its_slow_rank_is() -> None:
    stages = [0] * 4 + [1] * 4
    assert compare([1.0] * 4 + [2.0] * 4, stages).slow == ()
    assert compare([1.0] * 3 + [1.6] + [2.0] * 4, stages).slow == (3,)


@pytest.mark.parametrize("seconds", [[0.0, 0.0], [1.0, 1.0], [1.0, 1.2]])
def test_two_ranks_of_about_one_speed_are_left_alone(seconds: list[float]) -> None:
    assert compare(seconds, [0, 0]).slow == ()
    assert compare([1.0, 1.4], [0, 0]).slow == (1,)


def slow_reading_on_rank_1(folder: Path) -> list[Comparison]:
    """Rank 1 reads each batch 300 ms late, which the other ranks wait for."""
    right = stepping.read_batches

    def late(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
        return right(*args)

    stepping.read_batches = late
    try:
        config = split(tiny_config(folder, eval_interval=0, train_samples=48))
        return run(replace(config, observe=replace(config.observe, straggler_interval=3))).comparisons
    finally:
        stepping.read_batches = right


def test_the_slow_rank_of_a_run_is_named_on_all_ranks_alike(tmp_path: Path, pool: Any) -> None:
    first, second = pool(2).run(slow_reading_on_rank_1, tmp_path)
    assert first == second
    assert len(first) == 2
    assert all(found.slowest_rank == 1 for found in first)
    assert first[1].slowest_seconds > first[1].median_seconds + 0.1, "the wait of the other rank was counted as work"


def test_a_line_names_the_ranks_and_a_row_is_read_at_a_glance() -> None:
    found = Comparison(slowest_rank=3, slowest_seconds=0.5, median_seconds=0.25, slow=(1, 3))
    assert str(found) == "SLOW: ranks 1, 3: rank 3 takes 0.500 s a step of its own, its peers' median is 0.250 s"
    row = {"step": 5, "consumed_samples": 40, "slowest_rank": 3, "slowest_seconds": 0.5, "median_seconds": 0.25}
    assert "slowest rank 3 | 0.500 s a step of its own | its peers' median 0.250 s" in step_line(row, 80)
