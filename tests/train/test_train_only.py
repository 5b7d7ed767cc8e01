"""A part that is trained alone gets the gradients it gets beside the others, and the others keep every bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.optim.trained import PARTS
from megatron_aquila.verify.layout import Layout, with_layout
from megatron_aquila.verify.observe import Observation, build_small, join_ranks, observe_rank
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import shrink
from tests.train.runs import run, tiny_config

CONFIG = shrink(
    RunConfig(
        model=ModelConfig(num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, vocab_size=61, vocab_multiple=8),
        parallel=ParallelConfig(),
        optim=OptimConfig(clip_grad=0.0),
        train=TrainConfig(global_batch=4, train_samples=100),
    ),
    Layout(),
)
LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence=True, pp=2, overlap=True, fused=True),
    Layout(pp=2, dp=2, small_buckets=True),
    Layout(dp=2, zero=3, overlap=True, small_buckets=True),
    Layout(pp=2, dp=2, zero=3, small_buckets=True, fused=True),  # some ranks have nothing to train
    Layout(tp=2, sequence=True, dp=2, zero=2, overlap=True, small_buckets=True),
    Layout(dp=2, zero=3, zero_group=1, overlap=True, small_buckets=True),
]


def observed(pool: Callable[[int], WorkerPool], part: str | None, layout: Layout) -> Observation:
    config = with_layout(replace(CONFIG, optim=replace(CONFIG.optim, train_only=part)), layout)  # type: ignore[arg-type]
    if layout.world_size == 1:
        return join_ranks([observe_rank(config)])
    return join_ranks(pool(layout.world_size).run(observe_rank, config))


def is_trained(name: str, part: str) -> bool:
    return any(word in name for word in PARTS[part])


def start() -> dict[str, torch.Tensor]:
    from megatron_aquila.checkpoint.layout import param_chunks
    from megatron_aquila.verify.observe import assemble

    return assemble(chunk for info in build_small(with_layout(CONFIG, Layout())).infos for chunk in param_chunks(info))


@pytest.mark.parametrize(("part", "layout"), [(part, LAYOUTS[0]) for part in PARTS] + [
    ("embeddings", LAYOUTS[1]), ("vocabulary", LAYOUTS[2]), ("head", LAYOUTS[1]), ("vocabulary", LAYOUTS[3]),
    ("embeddings", LAYOUTS[4]), ("norms", LAYOUTS[5]), ("vocabulary", LAYOUTS[6]),
], ids=str)  # fmt: skip
def test_gradients_are_those_of_a_whole_training_and_the_rest_stays(
    pool: Callable[[int], WorkerPool], part: str, layout: Layout
) -> None:
    whole, found, before = observed(pool, None, LAYOUTS[0]), observed(pool, part, layout), start()
    assert {name for name in whole.gradients if is_trained(name, part)} == set(found.gradients)
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-10, atol=1e-12)
    squares = sum(float(gradient.square().sum()) for gradient in found.gradients.values())
    assert found.grad_norm == pytest.approx(squares**0.5, rel=1e-10), "the norm is over what is trained"
    assert found.grad_norm < whole.grad_norm
    assert set(found.updated["sgd"]) == set(before), "all is there"
    for name, value in before.items():
        if is_trained(name, part):
            torch.testing.assert_close(found.updated["sgd"][name], whole.updated["sgd"][name], rtol=1e-10, atol=1e-12)
            assert not torch.equal(found.updated["sgd"][name], value)
        else:
            assert torch.equal(found.updated["sgd"][name], value)


def test_a_checkpoint_is_whole_and_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16, exit_samples=8)
    config = replace(config, optim=replace(config.optim, train_only="embeddings"))
    run(config)
    first = CheckpointReader(tmp_path / "run")
    weights = {name for name in first.tensors if not name.startswith("optimizer.")}
    states = {name.split(".", 2)[2] for name in first.tensors if name.startswith("optimizer.")}
    assert states == {"model.embed_tokens.weight"}
    assert len(weights) > 20
    going_on = replace(config, train=replace(config.train, exit_samples=None))
    going_on = replace(going_on, checkpoint=replace(config.checkpoint, resume=True))
    run(going_on)
    second = CheckpointReader(tmp_path / "run")
    assert (first.step, second.step) == (1, 2)
    for name in weights:
        same = torch.equal(first.read(name), second.read(name))
        assert same == (name != "model.embed_tokens.weight")
