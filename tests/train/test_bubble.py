"""The bubble that a run prints is that of its own schedule and stages, at its own number of microbatches."""

import re

import pytest

from megatron_aquila.commands import schedule
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.train.bubble import run_bubble, run_schedule


@pytest.mark.parametrize(
    ("schedule", "chunks", "microbatches", "percent"),
    [
        ("1f1b", 1, 32, 8.57),
        ("1f1b", 2, 32, 4.48),
        ("zb-h1", 1, 32, 3.03),
        ("zb-v", 2, 32, 1.54),  # none in a rank's own span, but a step ends in a barrier
        ("zb-v", 2, 8, 5.88),
        ("zb-h1", 1, 2, 45.45),  # too few for the closed form
    ],
)
def test_it_is_the_simulators(schedule, chunks, microbatches, percent):
    config = RunConfig(
        model=ModelConfig(num_layers=16),
        parallel=ParallelConfig(pipeline=4, schedule=schedule, chunks=chunks),
        train=TrainConfig(global_batch=microbatches),
    )
    assert 100 * bubble_of(config, 4).equal == pytest.approx(percent, abs=0.005)


def bubble_of(config, world_size):
    derived = derive(config, world_size)
    return run_bubble(derived, run_schedule(config, derived))


@pytest.mark.parametrize("flags", [[], ["--chunks", "2"], ["--schedule", "zb-v"]])
def test_that_of_the_run_s_own_stages_is_what_the_schedule_s_command_says(flags, capsys):
    words = ["--preset", "aquila2-34b", *flags]
    assert schedule.main([*words, "--world-size", "512"]) == 0
    (row,) = re.findall(r"^\S+ +\d+ +\S+ +(\d+\.\d\d) % ", capsys.readouterr().out, re.MULTILINE)
    bubble = bubble_of(load_config(words, world_size=512).config, 512)
    assert f"{100 * bubble.own:.2f}" == row
    assert bubble.own > bubble.equal, "the head weighs something"
