"""Runs whose gradients and weights are sharded: validated, checked, saved, resumed at another level, taken back."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import run, split, tiny_config
from tests.train.test_faults import run_poisoned, set_train, tensors

Pools = Callable[[int], WorkerPool]
SMALL = 1 / 256  # MiB: a bucket for nearly every matrix
KINDS: dict[str, dict[str, Any]] = {
    "fp16": {"optim": {}, "parallel": {}},
    "bf16": {
        "optim": {"master_weights": "remainder", "moments_dtype": "bf16", "beta1": 0.9, "beta2": 0.95},
        "parallel": {"deterministic_reduce": True, "grad_reduce": "bf16"},
    },
}


def level(config: RunConfig, zero: int, save: Path, **parallel: Any) -> RunConfig:
    """``config`` with ``--zero``, saving to a folder of its own or going on in it."""
    config = split(config, zero=zero, bucket_mib=SMALL, **parallel)
    return replace(config, checkpoint=replace(config.checkpoint, save=save, resume=True))


@pytest.mark.parametrize("precision", KINDS)
def test_a_run_goes_on_at_another_level_bit_by_bit(precision: str, pool: Pools, tmp_path: Path) -> None:
    """With a microbatch a step there is one round of gradients, so that no sum has another order."""
    kind = KINDS[precision]
    config = tiny_config(tmp_path, train_samples=16, global_batch=4, precision=precision, check_replicas=1)
    config = replace(config, optim=replace(config.optim, **kind["optim"]))
    half = set_train(config, exit_samples=8)
    (whole, *_) = pool(2).run(run, level(config, 1, tmp_path / "whole", **kind["parallel"]))
    for before, after in ((3, 1), (1, 3), (2, 3)):
        folder = tmp_path / f"{before} to {after}"
        pool(2).run(run, level(half, before, folder, **kind["parallel"]))
        (rest, *_) = pool(2).run(run, level(config, after, folder, **kind["parallel"]))
        expected, found = tensors(tmp_path / "whole"), tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert rest.validations == whole.validations[-len(rest.validations) :]


def test_sharded_weights_are_taken_back(pool: Pools, tmp_path: Path) -> None:
    config = set_train(tiny_config(tmp_path, train_samples=32), on_nonfinite="rewind")
    back, other = (split(config, zero=3, bucket_mib=SMALL) for _ in range(2))
    notes, *_ = pool(2).run(run_poisoned, back, {4}, math.nan)[0]
    assert any("back to step_0000002, step 2, without samples 24-31" in note for note in notes)
    other = set_train(other, skip_samples=("24-31",))
    other = replace(other, checkpoint=replace(other.checkpoint, save=tmp_path / "left out"))
    pool(2).run(run, other)
    expected, found = tensors(tmp_path / "left out"), tensors(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
