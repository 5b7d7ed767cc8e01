import importlib.util
import sys
import types
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.kernels import adamw
from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_native_, adamw_torch_
from megatron_aquila.kernels.remainder import join, split
from megatron_aquila.optim.groups import ALIGNMENT

SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIZE, STEPS = 203, 4
NOW = {"factor": torch.tensor(1.0, dtype=torch.float64), "applies": torch.tensor(True)}
UPDATES = {"own": adamw_, "torch_fused": adamw_torch_}
IS_BUILT = importlib.util.find_spec("megatron_aquila._native") is not None
needs_extension = pytest.mark.skipif(not IS_BUILT, reason="the C++ extension is not built: setup.py build_ext")
IN_FLOAT32 = [
    *(pytest.param(update, id=name) for name, update in UPDATES.items()),
    pytest.param(adamw_native_, id="native", marks=needs_extension),
]


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, generator=generator, dtype=dtype) for _ in range(STEPS)]


def ours(update, dtype: torch.dtype, cuts: tuple[int, ...] = (0, SIZE), **now: torch.Tensor) -> list[torch.Tensor]:
    """Parameter and moments after some steps, each update made piece by piece."""
    state = [torch.linspace(-1, 1, SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype)]
    for step, grad in enumerate(gradients(dtype), start=1):
        for start, stop in pairwise(cuts):
            param, exp_avg, exp_avg_sq = (x[start:stop] for x in state)
            count = torch.tensor(step)
            update(param, grad[start:stop], exp_avg, exp_avg_sq, step=count, **SETTINGS, **(NOW | now))
    return state


def theirs(dtype: torch.dtype, **options: bool) -> list[torch.Tensor]:
    param = torch.linspace(-1, 1, SIZE, dtype=dtype).requires_grad_()
    optimizer = torch.optim.AdamW(
        [param], lr=SETTINGS["lr"], betas=(0.9, 0.95), eps=SETTINGS["eps"], weight_decay=0.1, **options
    )
    for grad in gradients(dtype):
        param.grad = grad
        optimizer.step()
    return [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_torch_adamw_to_the_bit(dtype: torch.dtype) -> None:
    assert all(map(torch.equal, ours(adamw_, dtype), theirs(dtype, foreach=False)))
    assert all(map(torch.equal, ours(adamw_torch_, dtype), theirs(dtype, fused=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_differs_by_roundings_only(dtype: torch.dtype) -> None:
    bound = 8 * STEPS * torch.finfo(dtype).eps  # eight roundings a step
    for a, b in zip(ours(adamw_, dtype), ours(adamw_torch_, dtype), strict=True):
        assert (a - b).norm() <= bound * b.norm()


@needs_extension
def test_the_native_one_differs_by_roundings_only() -> None:
    bound = 8 * STEPS * torch.finfo(torch.float32).eps
    for a, b in zip(ours(adamw_, torch.float32), ours(adamw_native_, torch.float32), strict=True):
        assert (a - b).norm() <= bound * b.norm()
    halved = ours(adamw_native_, torch.float32, factor=torch.tensor(0.5, dtype=torch.float64))
    assert (halved[1] - ours(adamw_, torch.float32)[1] / 2).norm() <= bound


@needs_extension
@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=9), threads=st.sampled_from((1, 3)))
def test_neither_a_split_nor_threads_change_a_bit_of_the_native_one(cuts: set[int], threads: int) -> None:
    cut, whole = ours(adamw_native_, torch.float32, (0, *sorted(cuts), SIZE)), ours(adamw_native_, torch.float32)
    assert all(map(torch.equal, cut, whole))
    from megatron_aquila._native import adamw

    scalars = dict.fromkeys(("factor", "decay", "one_minus_beta1", "beta2", "one_minus_beta2", "rate", "eps"), 0.5)
    one, many = ([torch.linspace(0.1, 1, 2**17).numpy() for _ in range(4)] for _ in range(2))
    adamw(*one, **scalars, correction=1.0, threads=1)
    adamw(*many, **scalars, correction=1.0, threads=threads)
    assert all(map(np.array_equal, one, many))


@needs_extension
def test_the_native_one_refuses_what_does_not_fit() -> None:
    from megatron_aquila._native import adamw

    names = ("factor", "decay", "one_minus_beta1", "beta2", "one_minus_beta2", "rate", "correction", "eps")
    scalars = dict.fromkeys(names, 0.5)
    three, four = np.ones(3, np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="four arrays of one size"):
        adamw(three, four, three, three, **scalars, threads=1)
    with pytest.raises(TypeError):
        adamw(*[np.ones(3)] * 4, **scalars, threads=1)


@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=9))
def test_a_split_parameter_is_updated_to_the_same_bits(cuts: set[int]) -> None:
    assert all(map(torch.equal, ours(adamw_, torch.float32, (0, *sorted(cuts), SIZE)), ours(adamw_, torch.float32)))


@given(cuts=st.sets(st.integers(1, 9), max_size=3), threads=st.sampled_from((1, 2)))
def test_a_split_where_shards_end_is_updated_to_the_same_bits_by_the_fused_one_too(
    cuts: set[int], threads: int
) -> None:
    def updated(borders: list[int]) -> list[torch.Tensor]:
        size = 10 * ALIGNMENT
        state = [torch.linspace(-1, 1, size), torch.zeros(size), torch.zeros(size)]
        grad = torch.linspace(-2, 3, size).sin()
        for start, stop in pairwise(borders):
            param, *moments = (x[start * ALIGNMENT : stop * ALIGNMENT] for x in state)
            there = grad[start * ALIGNMENT : stop * ALIGNMENT]
            adamw_torch_(param, there, *moments, step=torch.tensor(1), **SETTINGS, **NOW)
        return state

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, updated([0, *sorted(cuts), 10]), updated([0, 10])))
    finally:
        torch.set_num_threads(before)


def test_wrong_steps_would_show() -> None:
    right, wrong = (
        ours(adamw_, torch.float64),
        ours(lambda *a, step, **k: adamw_(*a, step=step + 1, **k), torch.float64),
    )
    assert (right[0] - wrong[0]).norm() > 1e-11 * right[0].norm()


def literal(param, grad, exp_avg, exp_avg_sq, *, lr, beta1, beta2, eps, weight_decay, step: int, factor: float) -> None:
    """The formula with numbers of the host, on gradients that were multiplied before."""
    grad = grad.clone().mul_(factor)
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@given(step=st.integers(1, 10**6), factor=st.floats(1e-6, 1), seed=st.integers(0, 99), size=st.integers(1, 99))
def test_scalars_of_the_device_change_no_bit(step: int, factor: float, seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = [torch.randn(size, generator=generator) for _ in range(4)]
    before[3].square_()
    found, right = ([x.clone() for x in before] for _ in range(2))
    scalars = {"step": torch.tensor(step), "factor": torch.tensor(factor, dtype=torch.float64)}
    adamw_(*found, **SETTINGS, **scalars, applies=torch.tensor(True))
    literal(*right, **SETTINGS, step=step, factor=factor)
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("update", IN_FLOAT32)
def test_an_update_that_does_not_apply_changes_nothing(update, bad: float) -> None:
    before = [torch.full((SIZE,), value) for value in (-0.0, bad, 0.3, 0.2)]
    after, published = [x.clone() for x in before], torch.full((SIZE,), -0.0).bfloat16()
    scalars = {"step": torch.tensor(0), "factor": torch.tensor(bad), "applies": torch.tensor(False)}
    update(*after, **SETTINGS, **scalars, publish=published)
    same = [torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(after, before, strict=True)]
    assert same == [True] * 4
    assert torch.equal(published.view(torch.int16), before[0].bfloat16().view(torch.int16))


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_gradients_are_multiplied_as_they_are_read(update) -> None:
    half = {"factor": torch.tensor(0.5, dtype=torch.float64)}
    halved = ours(lambda p, g, *moments, **k: update(p, g * 0.5, *moments, **k), torch.float64)
    assert all(map(torch.equal, ours(update, torch.float64, **half), halved))
    assert not torch.equal(ours(update, torch.float64)[1], halved[1])


def test_a_cpu_gets_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does what stands for it in a trace without data; a GPU gets the whole."""
    monkeypatch.setattr(adamw, "BLOCK", 64)
    for device in ("cpu", "meta"):
        lerp = mock.Mock(wraps=torch.Tensor.lerp)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "lerp", lambda *operands, lerp=lerp: lerp(*operands))
            now = {name: value.to(device) for name, value in {**NOW, "step": torch.tensor(1)}.items()}
            adamw_(*(torch.ones(SIZE, device=device) for _ in range(4)), **SETTINGS, **now)
            adamw_(*(torch.ones(0, device=device) for _ in range(4)), **SETTINGS, **now)
        assert lerp.call_count == 4


@pytest.mark.parametrize("update", IN_FLOAT32)
def test_a_remainder_gives_the_bits_of_a_whole_master(update, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many steps, in several blocks. Weights differ from a cast where the master is half-way between two."""
    monkeypatch.setattr(adamw, "BLOCK", 64)
    monkeypatch.setattr(adamw, "WIDENED", 64)
    master = torch.linspace(-1, 1, SIZE)
    master[::7] = from_half_way = torch.tensor(0x3F808000, dtype=torch.int32).view(torch.float32)
    weight, remainder = split(master)
    assert (weight != master.bfloat16()).sum() == (master == from_half_way).sum()
    moments, same = (([torch.zeros(SIZE) for _ in range(2)]) for _ in range(2))
    for step in range(1, 30):
        grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        now = {"step": torch.tensor(step), "factor": torch.tensor(0.3), "applies": torch.tensor(step % 5 != 0)}
        update(master, grad.clone(), *moments, **SETTINGS, **now)
        update(weight, grad.clone(), *same, **SETTINGS, **now, remainder=remainder)
        assert torch.equal(join(weight, remainder), master)
        assert all(map(torch.equal, moments, same))
        is_half_way = master.view(torch.int32) & 0xFFFF == 0x8000
        assert torch.equal(weight[~is_half_way], master.bfloat16()[~is_half_way])


@pytest.mark.parametrize("update", IN_FLOAT32)
def test_moments_in_bf16_are_those_in_fp32_rounded_each_step(update) -> None:
    param, other = torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE)
    narrow, wide = ([torch.zeros(SIZE, dtype=dtype) for _ in range(2)] for dtype in (torch.bfloat16, torch.float32))
    for step, grad in enumerate(gradients(torch.float32), start=1):
        update(param, grad.clone(), *narrow, step=torch.tensor(step), **SETTINGS, **NOW)
        update(other, grad.clone(), *wide, step=torch.tensor(step), **SETTINGS, **NOW)
        assert torch.equal(param, other)
        assert all(map(torch.equal, narrow, [moment.bfloat16() for moment in wide]))
        wide = [moment.bfloat16().float() for moment in wide]
    unrounded = ours(update, torch.float32)
    assert not torch.equal(unrounded[0], param)


def test_apex_is_called_as_fused_adam_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package runs on GPUs only; a stand-in with FusedAdam's calling convention checks the order of arguments."""

    def capturable(chunk_size, noop, tensors, lr, beta1, beta2, eps, step, mode, bias_correction, decay, inv_scale):
        assert (mode, bias_correction) == (1, 1)
        assert [x.dtype for x in (noop, lr, step, inv_scale)] == [torch.int32, torch.float32] * 2
        ((grad,), (param,), (exp_avg,), (exp_avg_sq,)) = tensors
        settings = {"lr": SETTINGS["lr"], "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay}
        assert lr == torch.tensor(SETTINGS["lr"])
        adamw_(param, grad, exp_avg, exp_avg_sq, **settings, step=step, factor=inv_scale, applies=noop != 1)

    stand_ins = {name: types.ModuleType(name) for name in ("apex", "apex.multi_tensor_apply", "amp_C")}
    stand_ins["apex.multi_tensor_apply"].multi_tensor_applier = lambda op, *args: op(65536, *args)
    stand_ins["amp_C"].multi_tensor_adam_capturable = capturable
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert all(map(torch.equal, ours(adamw_apex_, torch.float32), ours(adamw_, torch.float32)))
    outcomes = []
    for update in (adamw_apex_, adamw_):
        halves = split(torch.linspace(-1, 1, SIZE))
        moments = [torch.zeros(SIZE, dtype=torch.bfloat16) for _ in range(2)]
        grad, now = torch.ones(SIZE), NOW | {"step": torch.tensor(1)}
        update(halves[0], grad, *moments, **SETTINGS, **now, remainder=halves[1])
        outcomes.append([*halves, *moments])
    assert all(map(torch.equal, *outcomes))
