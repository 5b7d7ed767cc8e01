from dataclasses import fields, replace

import pytest

from megatron_aquila.config.derive import derive
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.verify.layout import NEEDS, WORDS, Layout, is_supported, requested_layout, with_layout
from megatron_aquila.verify.shrink import shrink, small_stages

FULL = Layout(
    tp=2,
    sequence=True,
    pp=2,
    schedule="zb-v",
    chunks=2,
    dp=2,
    cp=2,
    cp_method="ulysses",
    micro_batch=2,
    uneven=True,
    small_buckets=True,
    deterministic=True,
)


def test_it_names_what_is_not_the_simplest() -> None:
    assert str(Layout()) == "one process"
    assert str(FULL) == "tp 2 sp pp 2 zb-v chunks 2 dp 2 cp 2 ulysses mbs 2 uneven small buckets deterministic"
    assert set(WORDS) == {field.name for field in fields(Layout)}


@pytest.mark.parametrize(("name", "needed"), NEEDS)
def test_what_needs_another_option_goes_with_it(name: str, needed: str) -> None:
    left = FULL.without(needed)
    assert name not in left.options
    assert is_supported(left)


def test_a_schedule_takes_its_chunks_with_it() -> None:
    assert FULL.without("schedule") == replace(FULL, schedule="1f1b", chunks=1)
    assert replace(FULL, schedule="1f1b").without("tp").chunks == 2


@pytest.mark.parametrize(
    "layout",
    [Layout(sequence=True), Layout(schedule="zb-v"), Layout(pp=2, schedule="zb-v"),
     Layout(pp=2, schedule="zb-h1", chunks=2), Layout(deterministic=True), Layout(small_buckets=True),
     Layout(micro_batch=2, uneven=True), Layout(dp=2, uneven=True), Layout(dp=2, zero_group=2),
     Layout(dp=4, zero_group=3), Layout(cp=2, zero_group=1)],
    ids=str,
)  # fmt: skip
def test_what_cannot_or_need_not_run_is_not_supported(layout: Layout) -> None:
    assert not is_supported(layout)


def test_the_settings_say_what_is_asked_for() -> None:
    config = RunConfig(
        parallel=ParallelConfig(tensor=2, data=3, sequence=True, schedule="gpipe"), train=TrainConfig(micro_batch=8)
    )
    asked = requested_layout(config)
    assert asked == Layout(
        tp=2, sequence=True, schedule="gpipe", dp=3, micro_batch=2, overlap=True, small_buckets=True, fused=True
    )
    alone = requested_layout(replace(config, parallel=ParallelConfig(sequence=True)))
    assert not alone.sequence
    assert not alone.overlap, "there is nobody to talk to"
    plain = ParallelConfig(pipeline=2, schedule="zb-v", overlap=False, fuse_main_grads=False)
    staged = requested_layout(replace(config, parallel=plain))
    assert staged == Layout(pp=2, schedule="zb-v", chunks=2, micro_batch=2)


@pytest.mark.parametrize(("dp", "sizes"), [(2, (3, 1)), (3, (3, 1, 2)), (4, (3, 1, 3, 1))])
def test_uneven_replicas_are_asked_for_and_share_the_same_batch(dp: int, sizes: tuple[int, ...]) -> None:
    given = TrainConfig(micro_batch_per_dp=(8, *[5] * (dp - 1)))
    asked = requested_layout(RunConfig(train=given))
    assert (asked.dp, asked.micro_batch, asked.uneven) == (dp, 2, True)
    small = with_layout(shrink(RunConfig(train=given), asked), asked)
    assert small.train.micro_batch_per_dp == sizes
    assert requested_layout(small) == asked
    assert derive(small, dp).batch_at(0) == derive(with_layout(small, replace(asked, uneven=False)), dp).batch_at(0)
    equal = requested_layout(RunConfig(train=replace(given, micro_batch_per_dp=(5,) * dp)))
    assert equal == replace(asked, uneven=False)


def test_how_samples_are_split_is_asked_for() -> None:
    parallel = ParallelConfig(context=4, context_method="ulysses", fuse_main_grads=False)
    asked = requested_layout(RunConfig(parallel=parallel))
    assert asked == Layout(cp=4, cp_method="ulysses", overlap=True)
    assert asked.world_size == 4
    assert requested_layout(RunConfig(parallel=replace(parallel, context=1))) == Layout()
    small = with_layout(RunConfig(), asked).parallel
    assert (small.context, small.context_method) == (4, "ulysses")
    heads = [shrink(RunConfig(model=ModelConfig(num_heads=4)), layout).model.num_heads for layout in (Layout(), asked)]
    assert heads == [2, 4], "every rank gets a query head"


def test_small_config_keeps_structure() -> None:
    config = RunConfig(
        model=ModelConfig(num_layers=60, num_heads=8, num_kv_heads=4),
        parallel=ParallelConfig(stage_layers=(31, 29)),
        optim=OptimConfig(moments_dtype="bf16", master_weights="remainder"),
    )
    small = shrink(config, FULL)
    assert (small.optim.moments_dtype, small.optim.master_weights) == ("fp32", "fp32"), "float64 keeps nothing narrow"
    assert small.model.num_heads // (small.model.num_kv_heads or 1) == 2
    assert small_stages((15, 16, 16, 13)) == (2, 2, 2, 1)
    assert with_layout(small, Layout(pp=2)).parallel.stage_layers == (2, 1)
    assert with_layout(small, Layout()).parallel.stage_layers is None
    assert with_layout(small, Layout(pp=3)).parallel.stage_layers is None


def test_groups_that_share_out_are_asked_for_where_there_are_several() -> None:
    asked = requested_layout(RunConfig(parallel=ParallelConfig(data=4, zero=3, zero_group=2)))
    assert (asked.zero, asked.zero_group) == (3, 2)
    assert str(replace(asked, overlap=False, fused=False, small_buckets=False)) == "dp 4 ZeRO-3 in groups of 2"
    assert with_layout(RunConfig(), asked).parallel.zero_group == 2
    for parallel in (ParallelConfig(data=2, zero_group=2), ParallelConfig(zero_group=1)):
        assert requested_layout(RunConfig(parallel=parallel)).zero_group is None


def test_part_of_the_optimizer_is_offloaded() -> None:
    config = RunConfig(
        optim=OptimConfig(offload_optimizer=0.1), parallel=ParallelConfig(overlap=False, fuse_main_grads=False)
    )
    asked = requested_layout(config)
    assert asked == Layout(offload=True)
    assert with_layout(config, asked).optim.offload_optimizer == 0.9
    assert with_layout(config, Layout()).optim.offload_optimizer == 0


def test_activations_of_some_layers_are_offloaded() -> None:
    config = RunConfig(
        train=TrainConfig(offload_activations=12), parallel=ParallelConfig(overlap=False, fuse_main_grads=False)
    )
    asked = requested_layout(config)
    assert asked == Layout(offload_activations=True)
    assert with_layout(config, asked).train.offload_activations == 2
    assert with_layout(config, Layout()).train.offload_activations == 0
