"""The bubble that a run prints is that of its own schedule, at its own number of microbatches."""

import pytest

from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.train.bubble import run_bubble


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
    assert 100 * run_bubble(config, derive(config, 4)) == pytest.approx(percent, abs=0.005)
