"""Sharded runs that begin with published weights, or train one part alone, are the runs of ZeRO-1."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.optim import TrainedPart
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.optim.trained import PARTS
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.export import export_files
from tests.train.runs import run, tiny_config
from tests.train.test_faults import set_train, tensors
from tests.train.test_zero import level

Pools = Callable[[int], WorkerPool]
SHARDED = [(2, None), (3, None), (2, 2), (3, 2), (3, 1)]  # level and --zero-group, of four replicas
STEPS = 2


@pytest.fixture(scope="module")
def published(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two steps in which no sum depends on the level: one microbatch each, in rank order, without a norm to
    clip by; and a folder of weights that are not those it draws."""
    folder = tmp_path_factory.mktemp("published")
    config = tiny_config(folder, train_samples=8 * STEPS, global_batch=8, eval_interval=0, check_replicas=1)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=100))
    config = replace(config, optim=replace(config.optim, clip_grad=0.0))
    pool(4).run(run, level(replace(config, seed=7), 1, folder / "other"))
    reader, ids = CheckpointReader(folder / "other"), SpecialIds(bos=None, eos=1, pad=None)
    export_files(reader, folder / "hf", shape=reader.shape(), dtype=torch.float64, ids=ids, max_bytes=100_000)
    return config, folder / "hf"


def trained(pool: Pools, config: RunConfig, zero: int, save: Path, group: int | None = None) -> dict[str, torch.Tensor]:
    """The last checkpoint of the run at this level."""
    pool(4).run(run, level(config, zero, save, zero_group=group, deterministic_reduce=True))
    return tensors(save)


def is_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_published_weights_fill_shards(published: tuple[RunConfig, Path], pool: Pools, tmp_path: Path) -> None:
    config, folder = published
    drawn = trained(pool, config, 1, tmp_path / "drawn")
    config = replace(config, checkpoint=replace(config.checkpoint, init_from_hf=folder))
    expected = trained(pool, config, 1, tmp_path / "1")
    assert not is_same(expected, drawn), "the folder was not read"
    for zero, group in SHARDED:
        assert is_same(trained(pool, config, zero, tmp_path / f"{zero} {group}", group), expected), (zero, group)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_is_trained_from_published_weights(
    part: TrainedPart, published: tuple[RunConfig, Path], pool: Pools, tmp_path: Path
) -> None:
    config, folder = published
    config = replace(config, optim=replace(config.optim, train_only=part))
    config = replace(config, checkpoint=replace(config.checkpoint, init_from_hf=folder))
    expected = trained(pool, config, 1, tmp_path / "1")
    given = tensors(folder.parent / "other")
    weights = {name for name in expected if not name.startswith("optimizer.")}
    moved = {name for name in weights if not torch.equal(expected[name], given[name])}
    assert moved == {name for name in weights if any(word in name for word in PARTS[part])}
    for zero, group in SHARDED[1:3]:
        assert is_same(trained(pool, config, zero, tmp_path / f"{zero} {group}", group), expected), (zero, group)


def test_a_part_alone_goes_on_at_another_level(published: tuple[RunConfig, Path], pool: Pools, tmp_path: Path) -> None:
    config, _ = published
    config = replace(config, optim=replace(config.optim, train_only="embeddings"))
    expected = trained(pool, config, 1, tmp_path / "1")
    for (zero, group), (then, other) in (((3, 2), (1, None)), ((2, 1), (3, None))):
        save = tmp_path / f"{zero} {group} {then} {other}"
        assert not is_same(trained(pool, set_train(config, exit_samples=8), zero, save, group), expected)
        assert is_same(trained(pool, config, then, save, other), expected)
