"""Runs whose samples are split over ranks: the same run, and checkpoints that know nothing of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_aquila.config.derive import derive
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.loader import microbatch
from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.blocks import BLOCKS_CPU
from megatron_aquila.kernels.scores import Scores, alibi_slopes
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.ring import RingAttention
from megatron_aquila.parallel.ulysses import UlyssesAttention
from megatron_aquila.train import build, resume, start
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import agree, attended, compute_gradients
from megatron_aquila.verify.observe import SOURCES, build_small, machine_batches
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import Recorder, run, split, tiny_config
from tests.train.test_resume import resumed, tensors

Pools = Callable[[int], WorkerPool]
LAYOUTS = [(2, {"context": 2}), (4, {"context": 2, "context_method": "ulysses", "tp": 2, "sequence": True})]


def apart(config: RunConfig) -> RunConfig:
    """Documents end at token 7 and are kept apart."""
    rules = {"eod_token_id": 7, "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    return replace(config, data=replace(config.data, **rules))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Recorder]:
    """A run on one process."""
    config = split(apart(tiny_config(tmp_path_factory.mktemp("alone"))))
    return config, run(config)


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_run_on_split_samples_is_the_same_run(
    world: int, layout: dict[str, object], alone: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    """Losses, norms, counts, what attention worked on, validations by source, and every tensor of the checkpoint."""
    config, before = alone
    parallel = split(config, **layout).parallel  # type: ignore[arg-type]
    ours = replace(resumed(config, save=tmp_path), parallel=parallel, train=replace(config.train, check_replicas=2))
    after = pool(world).run(run, ours)[0]
    for mine, theirs in zip(after.reports, before.reports, strict=True):
        assert (mine.step, mine.num_tokens, mine.computed_tokens) == (theirs.step, theirs.num_tokens, 8 * 16)
        assert mine.attention_share == theirs.attention_share
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-13)
        assert mine.source_loss == pytest.approx(theirs.source_loss, rel=1e-13)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-11)
    assert min(report.attention_share for report in after.reports) < 1
    for one, other in zip(after.means, before.means, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-11)
        assert one.by_source == pytest.approx(other.by_source, rel=1e-11)
    assert config.checkpoint.save is not None
    expected, found = tensors(config.checkpoint.save), tensors(tmp_path)
    assert found.keys() == expected.keys(), "each rectangle has one writer, whoever holds copies"
    # Adam divides what is small by its own size: a last bit of a gradient can become 1e-9 of a weight.
    assert all(torch.allclose(found[name], expected[name], rtol=1e-7, atol=1e-9) for name in expected)


def test_checkpoints_pass_between_ways_to_split_bit_for_bit(
    alone: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    """Saved on one process, loaded and saved at cp 2, and again at cp 4."""
    config, _ = alone
    assert config.checkpoint.save is not None
    done, expected = config.checkpoint.save, tensors(config.checkpoint.save)
    for number, (world, layout) in enumerate([(2, {"context": 2}), (4, {"context": 4, "context_method": "ulysses"})]):
        parallel = split(config, **layout).parallel  # type: ignore[arg-type]
        folder = tmp_path / str(number)
        moved = replace(resumed(config, load=done, save=folder), parallel=parallel)
        pool(world).run(load_and_save, moved, world)
        assert all(torch.equal(found, expected[name]) for name, found in tensors(folder).items())
        assert tensors(folder).keys() == expected.keys()
        done = folder


def load_and_save(config: RunConfig, world: int) -> None:
    """Runs in a worker."""
    derived = derive(config, world)
    ctx = build.create_context(config, derived, torch.device("cpu"))
    begin = start.find_start(config, derived, start.resolve_checkpoint(config.checkpoint, ctx.world), None)
    machine = build.build_machine(config, derived, ctx)
    resume.load_weights(machine, begin)
    resume.begin_save(machine, begin.state, None).finish()


def gradients_of(config: RunConfig) -> tuple[float, float]:
    """Loss and gradient norm of one step. Collective; runs in a worker."""
    machine = build_small(config)
    batches = machine_batches(machine)
    tokens = agree(machine.ctx, batches).num_tokens
    sums = LossSums(SOURCES, num_tokens=tokens, device=machine.ctx.device)
    compute_gradients(machine, batches, sums)
    return sums.means(machine.ctx).loss, machine.optimizer.clip(0.0).norm.item()


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_eight_thousand_tokens(method: str, pool: Pools) -> None:
    config = RunConfig(
        model=ModelConfig(
            num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, ffn_size=16, vocab_size=61, vocab_multiple=8,
            seq_len=8192, init_std=0.2,
        ),
        optim=OptimConfig(optimizer="sgd"),
        train=TrainConfig(precision="fp64", device="cpu"),
    )  # fmt: skip
    whole, ours = (
        replace(config, parallel=ParallelConfig(context=cp, context_method=method, data=1))  # type: ignore[arg-type]
        for cp in (1, 2)
    )
    assert pool(2).run(gradients_of, ours)[0] == pytest.approx(gradients_of(whole), rel=1e-12)


def test_a_rank_keeps_its_tokens_and_the_documents_of_whole_samples() -> None:
    rules = DocumentRules(eod=7, reset_positions=True, reset_attention=True, mask_loss=True)
    samples = np.array([[1, 7, 2, 3, 4, 5, 7, 6, 8], [9] * 9])
    micro = microbatch(samples, np.zeros(2, dtype=np.int64), rules)
    whole, ours = build.host_batch(micro), build.host_batch(micro, 3, pieces=(range(2), range(6, 8)))
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "positions_BS"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)[:, [0, 1, 6, 7]])
    assert ours.positions_BS[0].tolist() == [0, 1, 4, 0]
    assert ours.documents is not None
    assert ours.documents.bounds == (0, 2, 7, 8, 16)
    assert ours.microbatch == 3
    assert attended(ours, cp=2) == attended(whole, cp=1) == 4 + 25 + 1 + 64
    assert attended(replace(ours, documents=None), cp=2) == 2 * 8**2


def context(cp: int) -> ParallelContext:
    one = ParallelContext.single()
    return replace(one, cp=Group("cp", 0, cp, tuple(range(cp)), None))


def test_attention_is_chosen_where_the_run_is_built() -> None:
    config = RunConfig(model=ModelConfig(num_heads=8, num_kv_heads=2))
    shape = derive(config, 1).shape
    ring, ulysses = ({"method": method, "overlap": True} for method in ("ring", "ulysses"))
    kernels = build.run_kernels(config, shape, context(1))
    assert build.split_attention(kernels, context(1).cp, **ring) is kernels
    by_heads = build.split_attention(kernels, context(4).cp, **ulysses).attention
    assert isinstance(by_heads, UlyssesAttention)
    assert by_heads.attention is kernels.attention
    by_blocks = build.run_kernels(config, shape, context(2))
    assert by_blocks.reasons["attention"] == "blocks: torch's flash attention for CPUs, block by block"
    around = build.split_attention(by_blocks, context(2).cp, **ring).attention
    assert isinstance(around, RingAttention)
    assert around.kernel is BLOCKS_CPU
    assert build.run_kernel_sizes(config, shape, context(2)).num_heads == 8
    dealt = build.kernel_sizes(shape, context(4), method="ulysses", has_documents=False)
    assert (dealt.num_heads, dealt.num_kv_heads, dealt.by_blocks) == (2, 1, False)


def test_a_ring_needs_attention_by_blocks() -> None:
    config = RunConfig(train=TrainConfig(kernels=("attention=sdpa",)))
    shape = derive(config, 1).shape
    with pytest.raises(ConfigError, match="attention goes block by block here: use one of blocks_flash"):
        build.run_kernels(config, shape, context(2))
    kernels = build.run_kernels(config, shape, context(1))
    with pytest.raises(AssertionError, match="a ring needs attention by blocks"):
        build.split_attention(kernels, context(2).cp, method="ring", overlap=True)


def test_a_ring_alters_scores_by_their_own_kernel() -> None:
    config = RunConfig(model=ModelConfig(position_embedding="alibi", num_kv_heads=8, num_heads=8, hidden_size=64))
    shape = derive(config, 1).shape
    kernels = build.run_kernels(config, shape, context(2))
    around = build.split_attention(kernels, context(2).cp, method="ring", overlap=True).attention
    assert isinstance(around, RingAttention)
    assert around.kernel is SCORE_BLOCKS
    for name, why in (("blocks", "it neither biases nor clamps scores"), ("reference", "use score_blocks;")):
        forced = replace(config, train=TrainConfig(kernels=(f"attention={name}",)))
        with pytest.raises(ConfigError, match=why):
            build.run_kernels(forced, shape, context(2))
    second = replace(context(4), cp=Group("cp", 1, 4, (0, 1, 2, 3), None))
    dealt = build.kernel_sizes(shape, second, method="ulysses", has_documents=False)
    assert dealt.scores == Scores(slopes=alibi_slopes(8)[2:4])
