from collections.abc import Callable

import pytest
import torch

from megatron_aquila.optim.buckets import Bucket
from megatron_aquila.optim.groups import plan_buckets
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.optim.toys import draw, give_gradients, whole


def one_bucket(dtype: torch.dtype, ctx: ParallelContext) -> tuple[Bucket, list[ParamInfo]]:
    shapes = [(20, 13), (5,)]
    infos = [whole(f"p{i}", draw(shape, i).to(dtype), weight_decay=True) for i, shape in enumerate(shapes)]
    (layout,) = plan_buckets(infos, bucket_bytes=10**6, num_shards=ctx.shards.size)
    return Bucket(layout, ctx), infos


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_become_views_and_keep_their_values(dtype: torch.dtype) -> None:
    bucket, infos = one_bucket(dtype, ParallelContext.single())
    for i, info in enumerate(infos):
        assert torch.equal(info.param, draw(info.param.shape, i).to(dtype))
        assert info.param.untyped_storage().data_ptr() == bucket.weights.untyped_storage().data_ptr()
    assert bucket.keeps_master is (dtype is torch.bfloat16)
    assert (bucket.master.data_ptr() == bucket.weights.data_ptr()) is not bucket.keeps_master
    assert bucket.grads.dtype is bucket.master.dtype


def test_bf16_gradients_are_summed_in_float32_and_dropped() -> None:
    bucket, infos = one_bucket(torch.bfloat16, ParallelContext.single())
    expected = torch.zeros(20, 13)
    in_bf16 = torch.zeros(20, 13, dtype=torch.bfloat16)
    for microbatch in range(20):
        grad = give_gradients(infos, microbatch)["p0"]
        expected += grad.float()
        in_bf16 += grad
        assert all(info.param.grad is None for info in infos)
    assert torch.equal(bucket.main_grads[infos[0].param].total, expected)
    assert (in_bf16.float() - expected).abs().max() > 0.01, "the wrong way would show"


def reduce_and_publish(dp: int) -> bool:
    ctx = ParallelContext.create(RankGrid(dp=dp), torch.device("cpu"))
    bucket, infos = one_bucket(torch.float64, ctx)
    give_gradients(infos, ctx.rank)
    bucket.begin_reduce()
    bucket.finish_reduce()
    expected = sum(draw((20, 13), 0, r) for r in range(dp)).flatten()
    for piece in (p for p in bucket.pieces if p.flat.info is infos[0]):
        got = bucket.grad_shard[piece.start : piece.stop]
        torch.testing.assert_close(got, expected[piece.flat.start : piece.flat.stop], rtol=1e-14, atol=1e-14)
    bucket.master.fill_(float(ctx.rank))
    bucket.begin_publish()
    bucket.finish_publish()
    owners = torch.arange(dp).repeat_interleave(bucket.layout.shard_size).double()
    return torch.equal(bucket.weights, owners) and torch.equal(
        infos[0].param.flatten(), owners[64:324]
    )  # behind the other


@pytest.mark.parametrize("dp", [2, 4])
def test_reduce_and_publish_in_place(pool: Callable[[int], WorkerPool], dp: int) -> None:
    assert all(pool(dp).run(reduce_and_publish, dp))
