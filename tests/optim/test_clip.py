import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_aquila.optim.clip import Clip, counted, counted_spans, squared_norm
from megatron_aquila.optim.groups import plan_buckets
from megatron_aquila.parallel.params import Constant, FlatRange, ParamInfo, Part


def fused(replica: int = 0) -> ParamInfo:
    """10 local rows of 4: q in rows 0-5, k (held by several ranks) in 5-7, v in 7-8; rows 8-9 are padding."""
    parts = tuple(
        Part(name=name, global_shape=(20, 4), offset=(0, 0), shape=(rows, 4), local_row=at, replica=copy)
        for name, at, rows, copy in (("q", 0, 5, 0), ("k", 5, 2, replica), ("v", 7, 1, 0))
    )
    param = nn.Parameter(torch.zeros(10, 4))
    return ParamInfo(param=param, stage=0, weight_decay=True, init=Constant(0.0), parts=parts)


@pytest.mark.parametrize(("replica", "expected"), [(0, range(32)), (1, [*range(20), *range(28, 32)])])
def test_replicas_and_padding_are_not_counted(replica: int, expected: list[int]) -> None:
    info = fused(replica)
    assert [i for start, stop in counted(FlatRange(info, 0, 40)) for i in range(start, stop)] == list(expected)


@given(cuts=st.lists(st.integers(0, 40), max_size=4), replica=st.integers(0, 1))
def test_counting_does_not_depend_on_the_shards(cuts: list[int], replica: int) -> None:
    info, borders = fused(replica), [0, *sorted(cuts), 40]
    whole = [i for start, stop in counted(FlatRange(info, 0, 40)) for i in range(start, stop)]
    split = [
        i
        for begin, end in pairwise(borders)
        for start, stop in counted(FlatRange(info, begin, end))
        for i in range(start, stop)
    ]
    assert split == whole


def test_a_vector_is_counted_by_elements() -> None:
    info = fused()
    part = Part(name="norm", global_shape=(6,), offset=(0,), shape=(6,))
    vector = replace(info, param=nn.Parameter(torch.zeros(6)), parts=(part,))
    assert list(counted(FlatRange(vector, 2, 6))) == [(2, 6)]


def test_squared_norm() -> None:
    cpu = torch.device("cpu")
    assert squared_norm([torch.tensor([3.0]), torch.tensor([0.0, 4.0])], cpu).item() == pytest.approx(25.0, rel=1e-7)
    assert squared_norm([torch.ones(2), torch.ones(2, dtype=torch.float64)], cpu).dtype is torch.float64
    nothing = squared_norm([], torch.device("meta"))  # a rank whose whole shard is padding
    assert (nothing.dtype, nothing.device.type) == (torch.float64, "meta")
    assert squared_norm([], cpu).item() == 0.0


def test_a_long_sum_keeps_its_digits() -> None:
    """Added one after the other in float32, the last squares would hardly count."""
    grad = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    exact = grad.double().square().sum().item()
    assert squared_norm([grad], grad.device).item() == pytest.approx(exact, rel=1e-5)


def norm(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("loss_scale", [1.0, 522893.0])
def test_clip_factor_is_torchs(loss_scale: float) -> None:
    grads = torch.tensor([3.0, 4.0], dtype=torch.float64)
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for max_norm in (1.0, 4.9, 5.0, 7.0):
        param.grad = grads.clone()
        torch.nn.utils.clip_grad_norm_([param], max_norm)
        clip = Clip.at(norm(5.0 * loss_scale), max_norm, loss_scale=loss_scale)
        assert (clip.norm, clip.applies) == (5.0, True)
        assert clip.factor.item() == min(1.0, max_norm / (5.0 + 1e-6)) / loss_scale
        torch.testing.assert_close(grads * loss_scale * clip.factor, param.grad, rtol=1e-15, atol=0)


def test_nothing_is_scaled() -> None:
    assert Clip.at(norm(5.0), 0.0).factor == Clip.at(norm(0.0), 1.0).factor == 1.0
    assert Clip.at(norm(5.0), 0.0, loss_scale=8.0).factor == 0.125


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_told(bad: float) -> None:
    clip = Clip.at(norm(bad), 1.0)
    assert not clip.applies
    assert not clip.norm.isfinite()


@given(shards=st.integers(1, 5), replicas=st.lists(st.integers(0, 1), min_size=1, max_size=4))
def test_spans_count_what_counted_says_and_padding(shards: int, replicas: list[int]) -> None:
    infos = [fused(replica) for replica in replicas]
    for info in infos:
        info.param.data.fill_(1.0)  # a gradient of ones; the padding of the bucket is 0
    (layout,) = plan_buckets(infos, bucket_bytes=10**6, num_shards=shards)
    flat = torch.zeros(layout.size)
    for slot in layout.slots:
        flat[slot.offset : slot.offset + 40] = slot.info.param.detach().flatten()
    total = 0.0
    for shard in range(shards):
        own = flat[shard * layout.shard_size : (shard + 1) * layout.shard_size]
        total += sum(own[span].sum().item() for span in counted_spans(layout.pieces(shard)))
    assert total == sum(32 - 8 * replica for replica in replicas)


def test_a_bucket_without_replicas_is_one_span() -> None:
    part = Part(name="whole", global_shape=(5, 3), offset=(0, 0), shape=(5, 3))
    infos = [replace(fused(), param=nn.Parameter(torch.zeros(5, 3)), parts=(part,)) for _ in range(7)]
    (layout,) = plan_buckets(infos, bucket_bytes=10**6, num_shards=1)
    assert counted_spans(layout.pieces(0)) == [slice(0, 6 * 64 + 15)]
    infos[3] = replace(infos[3], parts=(replace(part, replica=1),))
    (layout,) = plan_buckets(infos, bucket_bytes=10**6, num_shards=1)
    assert counted_spans(layout.pieces(0)) == [slice(0, 2 * 64 + 15), slice(4 * 64, 6 * 64 + 15)]
    assert counted_spans([]) == []
