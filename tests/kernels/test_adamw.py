import sys
import types
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_torch_

SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIZE, STEPS = 203, 4


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, generator=generator, dtype=dtype) for _ in range(STEPS)]


def ours(update, dtype: torch.dtype, cuts: tuple[int, ...] = (0, SIZE)) -> list[torch.Tensor]:
    """Parameter and moments after some steps, each update made piece by piece."""
    state = [torch.linspace(-1, 1, SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype)]
    for step, grad in enumerate(gradients(dtype), start=1):
        for start, stop in pairwise(cuts):
            param, exp_avg, exp_avg_sq = (x[start:stop] for x in state)
            update(param, grad[start:stop], exp_avg, exp_avg_sq, step=step, **SETTINGS)
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


@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=9))
def test_a_split_parameter_is_updated_to_the_same_bits(cuts: set[int]) -> None:
    assert all(map(torch.equal, ours(adamw_, torch.float32, (0, *sorted(cuts), SIZE)), ours(adamw_, torch.float32)))


def test_wrong_steps_would_show() -> None:
    right, wrong = (
        ours(adamw_, torch.float64),
        ours(lambda *a, step, **k: adamw_(*a, step=step + 1, **k), torch.float64),
    )
    assert (right[0] - wrong[0]).norm() > 1e-11 * right[0].norm()
    with pytest.raises(AssertionError, match="the first update is step 1, not 0"):
        adamw_(*(torch.zeros(1) for _ in range(4)), step=0, **SETTINGS)


def test_apex_is_called_as_fused_adam_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package runs on GPUs only; a stand-in with FusedAdam's calling convention checks the order of arguments."""

    def multi_tensor_adam(chunk_size, overflow, tensors, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
        assert (mode, bias_correction, overflow.dtype) == (1, 1, torch.int32)
        ((grad,), (param,), (exp_avg,), (exp_avg_sq,)) = tensors
        adamw_(
            param, grad, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, step=step
        )

    stand_ins = {name: types.ModuleType(name) for name in ("apex", "apex.multi_tensor_apply", "amp_C")}
    stand_ins["apex.multi_tensor_apply"].multi_tensor_applier = lambda op, *args: op(65536, *args)
    stand_ins["amp_C"].multi_tensor_adam = multi_tensor_adam
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert all(map(torch.equal, ours(adamw_apex_, torch.float32), ours(adamw_, torch.float32)))
