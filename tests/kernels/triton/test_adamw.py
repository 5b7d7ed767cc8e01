from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.adamw import adamw_, adamw_triton_
from megatron_aquila.kernels.remainder import join, split
from tests.kernels.triton.common import DEVICE, EPS32, draw, worst

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIZE, STEPS = 1500, 3


def scalars(step: int, factor: float = 1.0, *, applies: bool = True) -> dict[str, Tensor]:
    values = {"step": torch.tensor(step), "factor": torch.tensor(factor).double(), "applies": torch.tensor(applies)}
    return {name: value.to(DEVICE) for name, value in values.items()}


def after(update, dtype: torch.dtype, cuts: tuple[int, ...] = (0, SIZE), *, factor: float = 0.7) -> list[Tensor]:
    """Parameter, moments and published weights after some steps, each update made piece by piece."""
    torch.manual_seed(0)
    state = [draw(SIZE).to(dtype), *(torch.zeros(SIZE, dtype=dtype, device=DEVICE) for _ in range(2))]
    state.append(torch.zeros(SIZE, dtype=torch.bfloat16, device=DEVICE))
    for step in range(1, STEPS + 1):
        grad = draw(SIZE).to(dtype)
        for start, stop in pairwise(cuts):
            param, exp_avg, exp_avg_sq, publish = (x[start:stop] for x in state)
            now = scalars(step, factor)
            update(param, grad[start:stop], exp_avg, exp_avg_sq, publish=publish, **SETTINGS, **now)
    return state


def test_equals_the_reference() -> None:
    """Eight roundings a step, of values as large as the largest."""
    ours, right = after(adamw_triton_, torch.float32), after(adamw_, torch.float64)
    for found, value in zip(ours[:3], right[:3], strict=True):
        assert worst(found, value, 8 * STEPS * EPS32 * value.abs().max().expand(SIZE)) <= 1
    once_late = after(lambda *a, step, **k: adamw_triton_(*a, step=step + 1, **k), torch.float32)
    assert worst(once_late[0], right[0], 8 * STEPS * EPS32 * right[0].abs().max().expand(SIZE)) > 10
    unscaled = after(adamw_triton_, torch.float32, factor=1.0)
    assert worst(unscaled[1], right[1], 8 * STEPS * EPS32 * right[1].abs().max().expand(SIZE)) > 10


def test_an_update_that_does_not_apply_changes_nothing() -> None:
    before = [draw(SIZE) for _ in range(4)]
    tensors, published = [x.clone() for x in before], draw(SIZE).bfloat16()
    unchanged = published.clone()
    now = scalars(0, float("nan"), applies=False)
    adamw_triton_(*tensors, publish=published, **SETTINGS, **now)
    assert all(map(torch.equal, [*tensors, published], [*before, unchanged]))


def test_a_first_moment_may_forget_everything() -> None:
    """A beta of 0, whose logarithm is infinite."""
    tensors = [*(draw(8) for _ in range(3)), draw(8).square()]
    right = [x.clone() for x in tensors]
    settings = {**SETTINGS, "beta1": 0.0}
    adamw_triton_(*tensors, **settings, **scalars(1))
    adamw_(*right, **settings, **scalars(1))
    torch.testing.assert_close(tensors, right)


def test_what_is_published_is_the_parameter_rounded() -> None:
    param, _, _, published = after(adamw_triton_, torch.float32)
    if DEVICE.type == "cuda":
        assert torch.equal(published, param.bfloat16())
    assert worst(published, param.double(), param.double().abs() * torch.finfo(torch.bfloat16).eps) <= 1
    plain = after(lambda *a, publish, **k: adamw_triton_(*a, **k), torch.float32)
    assert torch.equal(plain[0], param)
    assert plain[3].eq(0).all()


def test_a_remainder_gives_the_bits_of_a_whole_master() -> None:
    """Subnormals and masters half-way between two weights among them."""
    torch.manual_seed(1)
    master = draw(SIZE)
    master[:3] = torch.tensor([0x00008000, 0x3F808000, 0x00000001], dtype=torch.int32).view(torch.float32)
    halves = split(master)
    moments = [draw(SIZE) / 10, draw(SIZE).square()]
    same = [moment.clone() for moment in moments]
    for step in range(1, STEPS + 1):
        grad = draw(SIZE)
        adamw_triton_(master, grad, *moments, **SETTINGS, **scalars(step))
        adamw_triton_(halves[0], grad, *same, **SETTINGS, **scalars(step), remainder=halves[1])
        assert torch.equal(join(*halves), master)
        assert all(map(torch.equal, moments, same))
        assert all(map(torch.equal, halves, split(master)))


def test_moments_in_bf16_are_read_and_written() -> None:
    """Rounded to 8 digits; the interpreter cuts them off."""
    torch.manual_seed(2)
    tensors = [draw(SIZE), draw(SIZE), draw(SIZE), draw(SIZE).square()]
    narrow = [*(x.clone() for x in tensors[:2]), *(x.bfloat16() for x in tensors[2:])]
    wide = [*(x.clone() for x in tensors[:2]), *(x.float() for x in narrow[2:])]
    for update, state in ((adamw_triton_, narrow), (adamw_, wide)):
        update(*state, **SETTINGS, **scalars(2))
    assert worst(narrow[0], wide[0].double(), 8 * EPS32 * wide[0].double().abs().max().expand(SIZE)) <= 1
    for found, value in zip(narrow[2:], wide[2:], strict=True):
        assert found.dtype is torch.bfloat16
        bound = value.double().abs() * torch.finfo(torch.bfloat16).eps + 8 * EPS32 * value.abs().max()
        assert worst(found, value.double(), bound) <= 1


@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=4))
def test_a_split_parameter_is_updated_to_the_same_bits(cuts: set[int]) -> None:
    split = after(adamw_triton_, torch.float32, (0, *sorted(cuts), SIZE))
    assert all(map(torch.equal, split, after(adamw_triton_, torch.float32)))


def test_nothing_to_update_and_misuse() -> None:
    settings = {**SETTINGS, **scalars(1)}
    adamw_triton_(*(draw(0) for _ in range(4)), **settings)
    with pytest.raises(AssertionError, match="contiguous master, float32 gradient and moments"):
        adamw_triton_(*(draw(8, dtype=torch.bfloat16) for _ in range(4)), **settings)
    with pytest.raises(AssertionError, match="contiguous master, float32 gradient and moments"):
        adamw_triton_(*(draw(16)[::2] for _ in range(4)), **settings)
    with pytest.raises(AssertionError, match="a parameter with a remainder is the weight itself"):
        adamw_triton_(*(draw(8) for _ in range(4)), publish=draw(8), remainder=draw(8), **settings)
    with pytest.raises(AssertionError, match="publish is not like param"):
        adamw_triton_(*(draw(8) for _ in range(4)), publish=draw(4), **settings)
