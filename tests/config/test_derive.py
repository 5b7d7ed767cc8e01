import pytest

from megatron_aquila.config.derive import derive, full_microbatches, memory_plan, model_shape, rank_grid
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.train.bubble import run_schedule


def test_the_default_model_is_the_7b():
    shape = model_shape(ModelConfig())
    assert (shape.ffn_size, shape.num_kv_heads, shape.head_dim, shape.padded_vocab_size) == (11008, 32, 128, 100096)


def test_given_sizes_are_not_derived():
    shape = model_shape(ModelConfig(ffn_size=77, num_kv_heads=1, head_dim=64, vocab_multiple=1))
    assert (shape.ffn_size, shape.num_kv_heads, shape.head_dim, shape.padded_vocab_size) == (77, 1, 64, 100008)


@pytest.mark.parametrize(("world", "data", "dp"), [(16, None, 4), (16, 4, 4), (None, None, 1), (None, 4, 4)])
def test_dp_is_what_the_world_leaves(world, data, dp):
    config = RunConfig(parallel=ParallelConfig(tensor=2, pipeline=2, data=data))
    assert rank_grid(config, world) == RankGrid(tp=2, pp=2, dp=dp)


def test_a_world_that_does_not_divide_is_our_own_mistake():
    with pytest.raises(AssertionError, match="a world of 3 is not a multiple of 2"):
        rank_grid(RunConfig(parallel=ParallelConfig(tensor=2)), 3)


def test_stages_batches_and_memory_follow():
    config = RunConfig(
        parallel=ParallelConfig(pipeline=2, stage_layers=(20, 12)),
        train=TrainConfig(global_batch=16, micro_batch=2, rampup_batch=(4, 4, 30)),
    )
    derived = derive(config, 4)
    assert [len(layers) for layers in derived.stages.layers] == [20, 12]
    assert derived.batch_at(0) == (4, 1)
    assert derived.batch_at(31) == (16, 4)
    order = run_schedule(config, derived)
    assert full_microbatches(derived) == 4 == sum(op == "F" for op, _, _ in order[0])
    plan = memory_plan(config, derived, order)
    assert (plan.order, plan.micro_batch, plan.grid) == (order, 2, derived.grid)
