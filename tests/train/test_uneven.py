"""A whole run on replicas that compute unequal numbers of samples at once is the run on one process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import Recorder, run, split, tiny_config

BOUND = 1e-12


def figures(*legs: Recorder) -> list[list[float]]:
    """By step: samples, counted tokens, loss and gradient norm."""
    return [
        [report.consumed_samples, report.global_batch, report.num_tokens, report.loss, report.grad_norm]
        for leg in legs
        for report in leg.reports
    ]


def test_a_ramp_a_validation_and_a_resume_on_other_splits(tmp_path: Path, pool: Callable[[int], WorkerPool]) -> None:
    """Half of it on one process, the rest on two replicas of which one takes three of every four samples."""
    config = tiny_config(tmp_path, micro_batch=1, rampup_batch=(4, 4, 16))
    config = replace(config, data=replace(config.data, eod_token_id=7, eod_mask_loss=True))
    whole = run(replace(config, checkpoint=replace(config.checkpoint, save=None)))
    half = run(replace(config, train=replace(config.train, exit_samples=24)))
    uneven = split(replace(config, train=replace(config.train, micro_batch_per_dp=(3, 1))))
    resumed = replace(uneven, checkpoint=replace(uneven.checkpoint, resume=True))
    first, second = pool(2).run(run, resumed)
    assert figures(first) == figures(second), "replicas agree"
    for found, wanted in zip(figures(half, first), figures(whole), strict=True):
        assert found == pytest.approx(wanted, rel=BOUND)
    assert first.validations, "nothing was validated on uneven replicas"
    wanted_losses = dict(whole.validations)
    assert dict(first.validations) == pytest.approx(
        {step: wanted_losses[step] for step, _ in first.validations}, rel=BOUND
    )
