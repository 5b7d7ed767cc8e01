"""Checkpoints between runs that keep masters and moments in different ways, and in the same narrow one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.remainder import join
from megatron_aquila.train import build, resume, start
from megatron_aquila.train.masters import MASTER, REMAINDER
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import run, split, tiny_config
from tests.train.test_resume import figures, resumed, run_with_nan_filled_memory, tensors

Pools = Callable[[int], WorkerPool]
OFF = {"moments_dtype": "fp32", "master_weights": "fp32"}
WAYS: dict[str, dict[str, Any]] = {
    "whole": OFF,
    "remainders": OFF | {"master_weights": "remainder"},
    "narrow": {"moments_dtype": "bf16", "master_weights": "remainder"},
}


def kept_as(config: RunConfig, way: str, **checkpoint: Any) -> RunConfig:
    config = replace(config, train=replace(config.train, precision="bf16"))
    return resumed(replace(config, optim=replace(config.optim, **WAYS[way])), **checkpoint)


def test_narrow_states_resume_bit_equal(pool: Pools, tmp_path: Path) -> None:
    config = split(kept_as(tiny_config(tmp_path), "narrow"), tp=2)
    never = pool(2).run(run_with_nan_filled_memory, config)[0]
    assert config.checkpoint.save is not None
    again = resumed(config, load=config.checkpoint.save / "step_0000002", save=tmp_path / "again")
    assert figures(pool(2).run(run_with_nan_filled_memory, again)[0]) == figures(never)[2:]
    expected, found = tensors(config.checkpoint.save), tensors(tmp_path / "again")
    dtypes = {name.split(".")[1]: value.dtype for name, value in expected.items() if name.startswith("optimizer.")}
    assert dtypes == {"remainder": torch.int16, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    wide = replace(config, train=replace(config.train, precision="fp32"), optim=replace(config.optim, **OFF))
    wide = resumed(wide, load=config.checkpoint.save, save=tmp_path / "wide", load_optim=False)
    pool(2).run(load_and_save, wide)
    name = "model.norm.weight"
    master = join(expected[name], expected[f"optimizer.remainder.{name}"])
    assert torch.equal(tensors(tmp_path / "wide")[name], master), "weights alone, in a wider type, come from masters"


def load_and_save(config: RunConfig) -> list[str]:
    """What a resumed run says it read in another way; it saves what it read."""
    derived = derive(config, config.parallel.tensor)
    ctx = build.create_context(config, derived, torch.device("cpu"))
    begin = start.find_start(config, derived, start.resolve_checkpoint(config.checkpoint, ctx.world), None)
    machine = build.build_machine(config, derived, ctx)
    lines = resume.load_weights(machine, begin)
    for info in machine.infos:  # every replica's weights are those that its remainders belong to
        flat = info.param.detach().flatten()
        for kind, owned, values in machine.optimizer.ranges():
            if kind == "weight" and owned.info is info:
                assert torch.equal(values, flat[owned.start : owned.stop])
    resume.begin_save(machine, begin.state, None).finish()
    return lines


@pytest.fixture(scope="module")
def saved(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """Two steps with the states kept in each way."""
    configs = {}
    for way in WAYS:
        config = split(tiny_config(tmp_path_factory.mktemp(way), train_samples=16), tp=2)
        configs[way] = kept_as(config, way)
        pool(2).run(run, configs[way])
    return configs


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ("whole", "remainders", ["masters: kept as whole in the checkpoint, as remainders here; no bit is lost"]),
        ("remainders", "whole", ["masters: kept as remainders in the checkpoint, as whole here; no bit is lost"]),
        ("remainders", "narrow", ["moments: kept in fp32 in the checkpoint, rounded to bf16 here"]),
        ("narrow", "remainders", ["moments: kept in bf16 in the checkpoint, in fp32 here; no bit is lost"]),
        ("narrow", "narrow", []),
    ],
)
def test_another_run_keeps_states_in_its_own_way(
    pool: Pools, tmp_path: Path, saved: dict[str, RunConfig], first: str, then: str, told: list[str]
) -> None:
    folder = saved[first].checkpoint.save
    assert folder is not None
    other = kept_as(saved[first], then, load=folder, save=tmp_path)
    assert pool(2).run(load_and_save, other)[0] == told
    before, after = tensors(folder), tensors(tmp_path)
    assert all(torch.equal(masters(before)[name], master) for name, master in masters(after).items())
    moments = [name for name in before if name.startswith("optimizer.exp_avg")]
    assert moments
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in moments)


def masters(found: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {name.removeprefix(MASTER): value for name, value in found.items() if name.startswith(MASTER)}
    rests = {name.removeprefix(REMAINDER): value for name, value in found.items() if name.startswith(REMAINDER)}
    assert bool(whole) != bool(rests)
    return whole or {name: join(found[name], rest) for name, rest in rests.items()}
