import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_aquila.optim.clip import clip_factor, counted, squared_norm
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
    assert squared_norm([torch.tensor([3.0]), torch.tensor([0.0, 4.0])]).item() == pytest.approx(25.0, rel=1e-7)
    assert squared_norm([torch.ones(2), torch.ones(2, dtype=torch.float64)]).dtype is torch.float64
    assert squared_norm([]).item() == 0.0  # a rank whose whole shard is padding


def test_clip_factor_is_torchs() -> None:
    grads = torch.tensor([3.0, 4.0], dtype=torch.float64)
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for max_norm in (1.0, 4.9, 5.0, 7.0):
        param.grad = grads.clone()
        torch.nn.utils.clip_grad_norm_([param], max_norm)
        torch.testing.assert_close(grads * clip_factor(5.0, max_norm), param.grad, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("norm", "max_norm"), [(5.0, 0.0), (math.inf, 1.0), (math.nan, 1.0), (0.0, 1.0)])
def test_nothing_is_scaled(norm: float, max_norm: float) -> None:
    assert clip_factor(norm, max_norm) == 1.0
