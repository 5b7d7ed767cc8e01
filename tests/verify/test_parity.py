"""The proof: correct layouts hold, and a wrong one is blamed on the fewest options."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_aquila.verify.layout import Layout
from megatron_aquila.verify.observe import Observation, observe_layout
from megatron_aquila.verify.parity import Parity
from megatron_aquila.verify.pool import WorkerError, WorkerPool
from megatron_aquila.verify.rows import Claim
from tests.families import BAICHUAN_13B, FAMILIES, TWO_RANGE, of_family
from tests.verify.mutants import run_mutant

CONFIG = RunConfig(
    model=ModelConfig(num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=4),
    parallel=ParallelConfig(stage_layers=(2, 1)),
)
FULL = Layout(tp=2, sequence=True, pp=2, schedule="zb-h1", micro_batch=2, overlap=True)
REPLICAS = Layout(dp=2, overlap=True, small_buckets=True)
APART = replace(CONFIG, data=DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True))
Pools = Callable[[int], WorkerPool]


def test_every_axis_and_all_together_hold(pool: Pools) -> None:
    rows = [row for layout in (FULL, REPLICAS) for row in Parity(CONFIG, layout, pool).rows()]
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]
    assert [(row.axis, row.against) for row in rows if "bit" in row.against] == [
        ("pp", "one process, bit for bit"),
        ("schedule", "one process, bit for bit"),
        ("overlap", "tp 2 sp pp 2 zb-h1 mbs 2, bit for bit"),
        ("overlap", "dp 2 small buckets, bit for bit"),
        ("bucket sizes", "dp 2 deterministic, bit for bit"),
    ]
    assert 0.0 not in {row.worst.error for row in rows if row.against == "plain"}, "compared with itself"


TOGETHER = Layout(tp=2, sequence=True, pp=2, schedule="zb-h1", micro_batch=2, overlap=True)


@pytest.mark.parametrize("layout", [TOGETHER, Layout(tp=2, dp=2), Layout(cp=2, overlap=True)], ids=str)
def test_two_ranges_hold(layout: Layout, pool: Pools) -> None:
    *_, together, documents = Parity(of_family(APART, TWO_RANGE), layout, pool).rows()
    assert together.holds, together
    assert documents.holds, documents


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [TOGETHER, Layout(tp=2, dp=2), Layout(recompute="full")], ids=str)
def test_every_family_holds(family: str, layout: Layout, pool: Pools) -> None:
    parity = Parity(of_family(CONFIG, FAMILIES[family]), layout, pool)
    row = parity.hold(Claim(axis="all together", layout=layout))
    assert row.holds, row


@pytest.mark.parametrize("family", ["aquila", "baichuan2-13b", "two ranges"])
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, cp=2, sequence=True), Layout(tp=2, cp=2, cp_method="ulysses", recompute="full")], ids=str
)
def test_every_family_holds_where_samples_are_split(family: str, layout: Layout, pool: Pools) -> None:
    """With documents across the shards' borders."""
    model = {**TWO_RANGE, "score_clamp": 1024.0} if family == "two ranges" else FAMILIES[family]
    parity = Parity(of_family(APART, model), layout, pool)
    row = parity.hold(Claim(axis="all together", layout=layout))
    assert row.holds, row


def test_alibi_holds_where_logits_are_kept_and_documents_apart(pool: Pools) -> None:
    config = of_family(replace(APART, train=replace(APART.train, loss_chunk_tokens=0)), BAICHUAN_13B)
    *_, together, documents = Parity(config, Layout(tp=2), pool).rows()
    assert together.holds, together
    assert documents.holds, documents


def test_layouts_hold_with_documents_kept_apart(pool: Pools) -> None:
    layout = Layout(tp=2, micro_batch=2)
    *_, together, documents = Parity(APART, layout, pool).rows()
    assert (together.axis, documents.axis) == ("all together", "document masks")
    assert documents.against == "each document alone"
    assert together.holds
    assert documents.holds


def test_split_samples_hold_with_documents_across_their_borders(pool: Pools) -> None:
    rows = [*Parity(APART, Layout(cp=2, overlap=True), pool).rows()]
    assert [row.axis for row in rows] == ["world of one", "cp (ring)", "overlap", "all together", "document masks"]
    others = [
        Layout(cp=2, cp_method="ulysses", tp=2, sequence=True, recompute="selective"),
        Layout(cp=2, pp=2, schedule="zb-h1", recompute="full", overlap=True),
    ]
    parity = Parity(APART, Layout(tp=2, pp=2, cp=2), pool)
    rows += [parity.judge(Claim(axis=str(layout), layout=layout)) for layout in others]
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]


def test_a_bug_is_blamed_on_the_fewest_options(pool: Pools) -> None:
    """A bug of tp, met in a layout of everything, is a bug of tp."""
    ran: list[Layout] = []
    layout = Layout(tp=2, sequence=True, micro_batch=2, overlap=True)
    parity = Parity(CONFIG, layout, pool, run=run_mutant("no_norm_sum"))
    right = parity.observe

    def observe(layout: Layout) -> Observation:
        ran.append(layout)
        return right(layout)

    parity.observe = observe  # type: ignore[method-assign]
    row = parity.judge(Claim(axis="all together", layout=layout))
    assert row.smallest == Layout(tp=2, sequence=True)
    assert row.first_wrong == "gradient of model.norm.weight"
    assert len(ran) <= 1 + len(layout.options)


def test_a_bug_of_bits_is_blamed_with_its_twin(pool: Pools) -> None:
    """Half of an exact claim is the option that must not change a bit."""

    def run(config: RunConfig, workers: WorkerPool) -> Observation:
        wrong = config.parallel.schedule == "zb-h1" and config.train.micro_batch == 2
        found = plain
        return replace(found, loss=found.loss * (1 + 2**-52)) if wrong else found

    parity = Parity(CONFIG, FULL, pool, run=run)
    plain = parity.plain
    layout = Layout(tp=2, pp=2, schedule="zb-h1", dp=2, micro_batch=2)
    row = parity.judge(Claim(axis="schedule", layout=layout, twin=layout.without("schedule")))
    assert (row.first_wrong, row.smallest) == ("loss", Layout(schedule="zb-h1", micro_batch=2))


def test_a_layout_that_does_not_run_is_a_red_row(pool: Pools) -> None:
    def run(config: RunConfig, workers: WorkerPool) -> Observation:
        if config.parallel.pipeline > 1:
            raise WorkerError("observe_rank failed on rank 1 of 2:\nTraceback\nValueError: stuck\nrank 0: consequence")
        return observe_layout(config, workers)

    row = Parity(CONFIG, FULL, pool, run=run).judge(Claim(axis="all together", layout=Layout(pp=2, dp=2)))
    assert not row.holds
    assert row.smallest == Layout(pp=2)
    assert row.first_wrong is not None
    assert "failed on rank 1 of 2" in row.first_wrong
    assert "ValueError: stuck" in row.first_wrong


def test_no_layout_is_run_twice(pool: Pools) -> None:
    ran: list[RunConfig] = []

    def run(config: RunConfig, workers: WorkerPool) -> Observation:
        ran.append(config)
        return parity.plain

    parity = Parity(CONFIG, FULL, pool, run=run)
    assert len(list(parity.rows())) > len(ran)
    assert len(ran) == len({str(config) for config in ran})
