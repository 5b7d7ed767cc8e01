"""The proof, and the proof of the proof: correct layouts hold, and each seeded bug is caught and named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_aquila.verify import observe
from megatron_aquila.verify.observe import Observation, RankObservation
from megatron_aquila.verify.parity import BOUND, Parity, Row, compare, layouts
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import Layout, shrink, small_stages, with_layout

CONFIG = RunConfig(
    model=ModelConfig(num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=4),
    parallel=ParallelConfig(stage_layers=(2, 1)),
)
FULL = Layout(tp=2, sequence=True, pp=2, dp=2, micro_batch=2)
Pools = Callable[[int], WorkerPool]


@pytest.fixture(scope="module")
def parity(pool: Pools) -> Parity:
    return Parity(CONFIG, FULL, pool)


def test_every_axis_and_all_together_hold(parity: Parity) -> None:
    rows = list(parity.rows())
    assert [row.axis for row in rows] == [
        "world of one",
        "tp",
        "tp + sp",
        "pp",
        "pp",
        "dp (ZeRO-1)",
        "micro-batch size",
        "all together",
    ]
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]
    assert any(row.against.startswith("world of one") for row in rows)


def split(config: RunConfig) -> RunConfig:
    """``config`` with a schedule that takes the backward in two."""
    return replace(config, parallel=replace(config.parallel, schedule="zb-h1"))


def test_a_split_backward_is_bit_equal_to_a_whole_one(pool: Pools) -> None:
    rows = list(Parity(split(CONFIG), Layout(tp=2, sequence=True, pp=2), pool).rows())
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]
    assert [row.axis for row in rows if row.against.startswith("world of one")] == ["pp"]


def test_small_config_keeps_structure() -> None:
    small = shrink(CONFIG, FULL)
    assert small.model.num_heads // (small.model.num_kv_heads or 1) == 2
    assert small_stages((15, 16, 16, 13)) == (2, 2, 2, 1)
    assert with_layout(small, FULL).parallel.stage_layers == (2, 1)
    assert with_layout(small, Layout()).parallel.stage_layers is None


def test_an_axis_of_degree_one_is_not_tried() -> None:
    assert list(layouts(Layout(tp=2))) == ["world of one", "tp", "tp + sp"]
    assert list(layouts(Layout())) == ["world of one"]


# Seeded bugs. Each patches the worker it runs in and puts everything back.


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def no_norm_sum() -> Any:
    """Sequence-parallel norm gradients are not summed over tp."""
    from megatron_aquila.optim.distributed import DistributedOptimizer

    return patched(DistributedOptimizer, "_sum_over_tp", lambda self: None)


def row_output_added_again() -> Any:
    """A row-parallel output is added tp times."""
    from megatron_aquila.parallel import layers

    right = layers.reduce_scatter
    return patched(layers, "reduce_scatter", lambda x, group: right(x, group) * group.size)


def no_column_reduce() -> Any:
    """The column-parallel input gradient stays a partial sum."""
    from megatron_aquila.parallel import layers

    return patched(layers, "all_reduce_", lambda x, group, op="sum": x)


def mean_of_means() -> Any:
    """Every microbatch's loss is divided by its own count of tokens."""
    from megatron_aquila.train.loss import LossSums

    right = LossSums.loss

    def wrong(self: LossSums, loss_SB: torch.Tensor, batch: Any) -> torch.Tensor:
        return right(self, loss_SB, batch) * self.num_tokens / batch.loss_mask_BS.sum() / 4

    return patched(LossSums, "loss", wrong)


def vocab_log_offset() -> Any:
    """log(tp) too much in the vocab-parallel loss: the exponentials are summed once too often."""
    from megatron_aquila.parallel import vocab

    right = vocab.all_reduce_

    def wrong(x: torch.Tensor, group: Any, op: str = "sum") -> torch.Tensor:
        out = right(x, group, op)  # type: ignore[arg-type]
        return out if op == "max" or x.shape[:1] != (2,) else torch.stack([out[0], out[1] * group.size])

    return patched(vocab, "all_reduce_", wrong)


def dropped_layer() -> Any:
    """A stage leaves out its last layer."""
    from megatron_aquila.model.aquila import AquilaStage

    right = AquilaStage._blocks

    def wrong(self: AquilaStage, *inputs: Any) -> torch.Tensor:
        blocks = self.blocks
        self.blocks = blocks[:-1] if self.stage == 1 else blocks
        out = right(self, *inputs)
        self.blocks = blocks
        return out

    return patched(AquilaStage, "_blocks", wrong)


def kv_heads_swapped() -> Any:
    """Query heads read the wrong key/value group."""
    from megatron_aquila.model import attention

    right = attention.column_part

    def wrong(name: str, global_shape: tuple[int, int], tp: Any, *, local_row: int = 0) -> Any:
        part = right(name, global_shape, tp, local_row=local_row)
        if "k_proj" not in name:
            return part
        other = (tp.rank + 1) % tp.size
        return replace(part, offset=(other * part.shape[0], 0))

    return patched(attention, "column_part", wrong)


def query_heads_read_group_n_mod_k() -> Any:
    """Query head n reads key/value head n % K instead of n // (N / K)."""
    from megatron_aquila.train import build

    right = build.choose_kernels

    def wrong(*args: Any, **kwargs: Any) -> Any:
        kernels = right(*args, **kwargs)

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any) -> torch.Tensor:
            heads = torch.arange(q.shape[2]) % k.shape[2]
            return kernels.attention(q, k[:, :, heads], v[:, :, heads], documents)

        return replace(kernels, attention=attention)

    return patched(build, "choose_kernels", wrong)


def parameter_missing_from_norm() -> Any:
    """Clipping leaves a parameter out of the global norm."""
    from megatron_aquila.optim import distributed

    right = distributed.counted
    return patched(
        distributed, "counted", lambda flat: iter(()) if flat.info.name == "model.norm.weight" else right(flat)
    )


def norms_counted_tp_times() -> Any:
    """Clipping counts replicated parameters once a tp rank."""
    from megatron_aquila.optim import distributed

    return patched(distributed, "counted", lambda flat: iter([(flat.start, flat.stop)]))


def shard_border_off_by_one() -> Any:
    """An optimizer shard begins one element late inside a parameter."""
    from megatron_aquila.optim.buckets import Bucket

    right = Bucket.publish_

    def wrong(self: Bucket) -> None:
        self.master.copy_(self.master.roll(1))
        right(self)

    return patched(Bucket, "publish_", wrong)


def no_param_gather() -> Any:
    """Replicas keep the stale parameters of the other shards."""
    from megatron_aquila.optim import buckets

    return patched(buckets, "all_gather_flat_", lambda out, shard, group: None)


def rope_off_by_one() -> Any:
    """Rotary positions grow twice as fast. (A constant shift changes nothing: rope is relative.)"""
    from megatron_aquila.model import aquila

    right = aquila.rope_tables
    return patched(aquila, "rope_tables", lambda positions, **settings: right(positions * 2, **settings))


MUTANTS: dict[str, tuple[Callable[[], Any], Layout]] = {
    "no_norm_sum": (no_norm_sum, Layout(tp=2, sequence=True)),
    "row_output_added_again": (row_output_added_again, Layout(tp=2, sequence=True)),
    "no_column_reduce": (no_column_reduce, Layout(tp=2)),
    "mean_of_means": (mean_of_means, Layout(dp=2)),
    "vocab_log_offset": (vocab_log_offset, Layout(tp=2)),
    "dropped_layer": (dropped_layer, Layout(pp=2)),
    "kv_heads_swapped": (kv_heads_swapped, Layout(tp=2)),
    "query_heads_read_group_n_mod_k": (query_heads_read_group_n_mod_k, Layout()),
    "parameter_missing_from_norm": (parameter_missing_from_norm, Layout()),
    "norms_counted_tp_times": (norms_counted_tp_times, Layout(tp=2)),
    "shard_border_off_by_one": (shard_border_off_by_one, Layout(dp=2)),
    "no_param_gather": (no_param_gather, Layout(dp=2)),
    "rope_off_by_one": (rope_off_by_one, Layout()),
}


def weight_gradient_never_paid() -> Any:
    """What an input gradient leaves out is dropped."""
    from megatron_aquila.parallel.weight_grads import WeightGradQueue

    return patched(WeightGradQueue, "pay", lambda self, key: self._owed.pop(key) and None)


def weight_gradient_paid_twice() -> Any:
    """What an input gradient leaves out is added twice."""
    from megatron_aquila.parallel.weight_grads import WeightGradQueue

    def wrong(self: WeightGradQueue, key: Any) -> None:
        for job in 2 * self._owed.pop(key):
            job()

    return patched(WeightGradQueue, "pay", wrong)


MUTANTS |= {
    "weight_gradient_never_paid": (weight_gradient_never_paid, Layout(pp=2)),
    "weight_gradient_paid_twice": (weight_gradient_paid_twice, Layout(pp=2)),
}


def observe_mutant(config: RunConfig, mutant: str) -> RankObservation:
    with MUTANTS[mutant][0]():
        return observe.observe_rank(config)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_seeded_bug_is_caught_and_named(mutant: str, parity: Parity, pool: Pools) -> None:
    layout = MUTANTS[mutant][1]
    config = split(parity.config) if mutant.startswith("weight_gradient") else parity.config
    parts = pool(layout.world_size).run(observe_mutant, with_layout(config, layout), mutant)
    found = Observation(
        loss=parts[0].loss,
        grad_norm=parts[0].grad_norm,
        gradients=observe.assemble(chunk for part in parts for chunk in part.gradients),
        updated={rule: observe.assemble(c for part in parts for c in part.updated[rule]) for rule in observe.RULES},
    )
    assert_caught(compare("mutant", layout, "plain", parity.plain, found))


def assert_caught(row: Row) -> None:
    assert not row.holds
    assert row.first_wrong is not None
    assert not row.worst.error <= 10 * BOUND, "too close to the bound to be called caught"


def test_the_smallest_failing_layout_is_found(parity: Parity) -> None:
    """A bug of tp alone is blamed on tp, not on the layout in which it was met."""

    def broken(layout: Layout) -> Observation:
        return replace(parity.plain, loss=parity.plain.loss + (0.5 if layout.tp > 1 else 0.0))

    fake = object.__new__(Parity)
    fake.plain = parity.plain
    fake.observe = broken  # type: ignore[method-assign]
    assert fake.smallest_failing(FULL) == Layout(tp=2)


# Rope is relative: while attention keeps documents apart, where their positions start changes nothing. So that bug is
# looked for where only positions are reset.
APART = replace(CONFIG, data=DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True))
ONLY_POSITIONS = replace(CONFIG, data=DataConfig(reset_position_ids=True))


def test_layouts_hold_with_documents_kept_apart(pool: Pools) -> None:
    rows = list(Parity(APART, FULL, pool).rows())
    assert len(rows) == 9
    assert (rows[-1].axis, rows[-1].against) == ("document masks", "each document alone")
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]


def mask_ignored() -> Any:
    """Attention sees the whole sample (Megatron-LM#415)."""
    from megatron_aquila.model.attention import Attention

    right = Attention.forward
    return patched(Attention, "forward", lambda *args: right(*args[:-2], None, args[-1]))


def mask_off_by_one() -> Any:
    """A document begins with the end of the one before."""
    from megatron_aquila.data.documents import DocumentRules

    right = DocumentRules.bounds
    return patched(
        DocumentRules,
        "bounds",
        lambda self, tokens: (bounds := right(self, tokens)) - (bounds % tokens.shape[1] == tokens.shape[1] // 2 + 1),
    )


def positions_not_reset() -> Any:
    """Positions count on through the sample."""
    from megatron_aquila.data.documents import DocumentRules

    right = DocumentRules.positions
    return patched(DocumentRules, "positions", lambda self, tokens: right(replace(self, reset_positions=False), tokens))


def positions_skip_one_after_a_start() -> Any:
    """Rotary positions are off by one after a document's first token."""
    from megatron_aquila.model import aquila

    right = aquila.rope_tables
    return patched(aquila, "rope_tables", lambda positions, **settings: right(positions + (positions > 0), **settings))


def end_of_document_counts() -> Any:
    """The loss is taken after the end of a document, too."""
    from megatron_aquila.data.documents import DocumentRules

    right = DocumentRules.loss_mask
    return patched(DocumentRules, "loss_mask", lambda self, tokens: right(replace(self, mask_loss=False), tokens))


DOCUMENT_MUTANTS: dict[str, tuple[Callable[[], Any], RunConfig]] = {
    "mask_ignored": (mask_ignored, APART),
    "mask_off_by_one": (mask_off_by_one, APART),
    "positions_not_reset": (positions_not_reset, ONLY_POSITIONS),
    "positions_skip_one_after_a_start": (positions_skip_one_after_a_start, APART),
    "end_of_document_counts": (end_of_document_counts, APART),
}


def observe_document_mutant(config: RunConfig, mutant: str) -> RankObservation:
    with DOCUMENT_MUTANTS[mutant][0]():
        return observe.observe_rank(config)


@pytest.mark.parametrize("mutant", DOCUMENT_MUTANTS)
def test_a_seeded_bug_of_documents_is_caught(mutant: str, pool: Pools) -> None:
    parity = Parity(DOCUMENT_MUTANTS[mutant][1], Layout(), pool)
    (part,) = pool(1).run(observe_document_mutant, with_layout(parity.config, Layout()), mutant)
    found = Observation(
        loss=part.loss,
        grad_norm=part.grad_norm,
        gradients=observe.assemble(part.gradients),
        updated={rule: observe.assemble(part.updated[rule]) for rule in observe.RULES},
    )
    assert compare("right", Layout(), "plain", parity.plain, parity.observe(Layout())).holds
    assert_caught(compare("mutant", Layout(), "plain", parity.plain, found))
