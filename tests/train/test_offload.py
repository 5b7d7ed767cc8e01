"""A run whose optimizer is on the host: the same figures, the same checkpoints, whatever share is there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.adamw import adamw_triton_
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.optim.rules import AdamW
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train import build
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import split, tiny_config
from tests.train.test_resume import figures, resumed, run_with_nan_filled_memory, tensors

Pools = Callable[[int], WorkerPool]


def offloaded(config: RunConfig, share: float, **checkpoint: Any) -> RunConfig:
    return resumed(replace(config, optim=replace(config.optim, offload_optimizer=share)), **checkpoint)


@pytest.mark.parametrize(
    ("optim", "parallel"),
    [({}, {"zero": 3}), ({"moments_dtype": "bf16", "master_weights": "remainder"}, {})],
)
def test_a_run_and_its_checkpoints_do_not_show_it_and_resume_bit_equal(
    pool: Pools, tmp_path: Path, optim: dict[str, Any], parallel: dict[str, Any]
) -> None:
    config = split(tiny_config(tmp_path, precision="bf16"), bucket_mib=1 / 256, **parallel)
    config = replace(config, optim=replace(config.optim, **optim))
    never = pool(2).run(run_with_nan_filled_memory, config)[0]
    there = offloaded(config, 0.6, save=tmp_path / "there")
    assert figures(pool(2).run(run_with_nan_filled_memory, there)[0]) == figures(never)
    more = offloaded(config, 1.0, load=tmp_path / "there" / "step_0000002", save=tmp_path / "more")
    assert figures(pool(2).run(run_with_nan_filled_memory, more)[0]) == figures(never)[2:]
    assert config.checkpoint.save is not None
    expected = tensors(config.checkpoint.save)
    for folder in ("there", "more"):
        found = tensors(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_rule_beside_a_gpu_is_the_hosts_own() -> None:
    host = ParallelContext.single()
    kernels = choose_kernels(host.device, torch.float32)
    assert build.offload(OptimConfig(), kernels, host) is None
    for ctx in (host, replace(host, device=torch.device("cuda"))):
        found = build.offload(OptimConfig(offload_optimizer=0.5), replace(kernels, adamw=adamw_triton_), ctx)
        assert found is not None
        assert found.share == 0.5
        assert isinstance(found.rule, AdamW)
        assert found.rule.kernel is (adamw_triton_ if ctx is host else kernels.adamw)
