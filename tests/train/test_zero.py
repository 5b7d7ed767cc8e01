"""Runs whose gradients and weights are sharded: validated, checked, saved, resumed at another level, taken back."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.parallel.sanity import ReplicaError, check_replicated
from megatron_aquila.verify.layout import Layout, with_layout
from megatron_aquila.verify.observe import build_small
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import shrink
from tests.train.runs import run, split, tiny_config
from tests.train.test_faults import run_poisoned, set_train, tensors
from tests.verify.test_parity import CONFIG

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


def test_a_run_goes_on_in_other_groups_bit_by_bit(pool: Pools, tmp_path: Path) -> None:
    """One microbatch a step, summed in rank order: neither groups nor levels change a sum."""
    config = tiny_config(tmp_path, train_samples=32, global_batch=8, precision="bf16", check_replicas=1)
    config = replace(config, optim=replace(config.optim, master_weights="remainder", clip_grad=0.0))
    half, in_order = set_train(config, exit_samples=16), {"deterministic_reduce": True}
    pool(4).run(run, level(config, 1, tmp_path / "whole", **in_order))
    expected = tensors(tmp_path / "whole")
    for (zero, group), (then, other) in (((3, 2), (1, None)), ((1, None), (3, 1)), ((2, 1), (3, 2))):
        folder = tmp_path / f"{zero} {group} {then} {other}"
        pool(4).run(run, level(half, zero, folder, zero_group=group, **in_order))
        pool(4).run(run, level(config, then, folder, zero_group=other, **in_order))
        found = tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_of_a_shard_take_turns_in_writing(pool: Pools, tmp_path: Path) -> None:
    config = set_train(tiny_config(tmp_path, train_samples=16, global_batch=8), exit_samples=8)
    pool(4).run(run, level(config, 1, tmp_path / "cut", zero_group=1))
    (folder,) = (tmp_path / "cut").glob("step_*")
    sizes = [path.stat().st_size for path in sorted(folder.glob("rank_*.safetensors"))]
    assert len(sizes) == 4
    assert min(sizes) > max(sizes) / 4


def drifted(config: RunConfig, rank: int) -> str:
    """What the check says once a bit of this rank's master differs from its copy's."""
    machine = build_small(config)
    if machine.ctx.rank == rank:
        kinds = {kind: view for kind, _, view in machine.optimizer.ranges()}
        kinds["weight"][0] += 1
    machine.optimizer.refresh_masters() if config.parallel.zero < 3 else None
    machine.optimizer.step(0.0, machine.optimizer.clip(0.0))
    try:
        check_replicated(machine.infos, machine.ctx, read=lambda one: machine.optimizer.wait_for_weights([one]))
    except ReplicaError as error:
        return str(error)
    return "nothing was seen"


@pytest.mark.parametrize("zero", [1, 3])
def test_the_check_sees_a_copy_that_drifts(zero: int, pool: Pools) -> None:
    config = with_layout(shrink(CONFIG, Layout(dp=4)), Layout(dp=4, zero=zero, zero_group=2))
    told = pool(4).run(drifted, config, 3)
    assert all("ranks 0, 1 and ranks 2, 3 differ" in text for text in told), told


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
