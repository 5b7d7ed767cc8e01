"""The check at start tells a wrong kernel from a right one: kernels with one wrong line each are refused."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels import dispatch
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels
from megatron_aquila.kernels.self_check import TRIALS, Sizes, why_refused
from tests.kernels.triton.common import DEVICE, DTYPES

SIZES = Sizes(hidden_size=48, ffn_size=40, head_dim=20)
OPS = [op for op, names in IMPLEMENTATIONS.items() if "triton" in names]

# file of the kernel, op -> the right text, the wrong one
MUTANTS = {
    "the norm forgets eps": ("rms_norm", "rms_norm", " / SIZE + eps", " / SIZE"),
    "the norm divides by the block": ("rms_norm", "rms_norm", "axis=0) / SIZE + eps", "axis=0) / BLOCK + eps"),
    "no part along x": ("rms_norm", "rms_norm", "(grad_normed - normed * mean)", "grad_normed"),
    "a row too few": ("rms_norm", "rms_norm", "tl.range(program, num_rows,", "tl.range(program, num_rows - 1,"),
    "the last column is left out": ("rms_norm", "add_rms_norm", "inside = column < SIZE", "inside = column < SIZE - 1"),
    "gradient of the weight without rms": ("rms_norm", "add_rms_norm", "part += grad * normed", "part += grad * value"),
    "the residual's gradient twice": ("rms_norm", "add_rms_norm", "        if ADDS:\n            out +=", "        if ADDS:\n            out += out +"),
    "the sum is not stored": ("rms_norm", "add_rms_norm", "rounded, mask=inside)", "rounded * 0, mask=inside)"),
    "gate and up change places": ("swiglu", "swiglu", "gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate"),
    "the slope of silu": ("swiglu", "swiglu", "silu * (1.0 - sigmoid)", "gate * (1.0 - sigmoid)"),
    "the gradient of up goes to gate": ("swiglu", "swiglu", "tl.store(to + SIZE,", "tl.store(to,"),
    "backward turns forward": ("rope", "rope_qkv", "t = -t", "t = t"),
    "the second half turns the wrong way": ("rope", "rope_qkv", "(second * c + first * t)", "(second * c - first * t)"),
    "samples change places": ("rope", "rope_qkv", "token // num_samples, token % num_samples", "token // num_samples, 0 * token"),
    "k is not turned": ("rope", "rope_qkv", "turning, turning, cos_SBD", "q, q, cos_SBD"),
    "v is turned back": ("rope", "rope_qkv", "(True, True, False)", "(True, True, True)"),
    "decay after the update": ("adamw", "adamw", "weight *= decay\n", "weight *= 1.0\n"),
    "the second moment's correction": ("adamw", "adamw", "tl.div_rn(tl.sqrt_rn(square), correction2)", "tl.sqrt_rn(square)"),
    "gradients are not clipped": ("adamw", "adamw", " * tl.load(factor).to(tl.float32)", ""),
    "the remainder is not added": ("adamw", "adamw", "<< 16) + rest)", "<< 16))"),
    "the weight is cut off": ("adamw", "adamw", "((bits - rest.to(tl.int32)) >> 16)", "(bits >> 16)"),
    "moments of the wrong sign": ("adamw", "adamw", "mean.to(exp_avg.dtype.element_ty)", "(-mean).to(exp_avg.dtype.element_ty)"),
    "what is not finite is applied": ("adamw", "adamw", "if tl.load(applies):", "if size > 0:"),
    "the tail of a flat tensor": ("adamw", "adamw", "inside = at < size", "inside = at < size // BLOCK * BLOCK"),
    "the sum is not scaled anew": ("cross_entropy", "softmax_statistics", "total * tl.exp(largest - shift)", "total"),
    "padding in the sum": ("cross_entropy", "softmax_statistics", "tl.where(is_real, value, float(\"-inf\"))", "value"),
    "the last real column is left out of the sum": ("cross_entropy", "softmax_statistics", "column < num_real", "column < num_real - 1"),
    "only the last block is counted": ("cross_entropy", "softmax_statistics", "count, 0.0) + here", "0.0, 0.0) + here"),
    "another rank's label": ("cross_entropy", "softmax_statistics", "tl.load(columns + row), mask=mine, other=0.0)", "tl.load(columns + row))"),
    "the first block alone has a gradient": ("cross_entropy", "softmax_gradient", "tl.range(0, num_columns, BLOCK)", "tl.range(0, BLOCK, BLOCK)"),
    "another rank's label in the gradient": ("cross_entropy", "softmax_gradient", "tl.load(columns + row), -1)", "tl.load(columns + row), 0)"),
    "a gradient of padding": ("cross_entropy", "softmax_gradient", "tl.where(column < num_real, grad * weight, 0.0)", "grad * weight"),
    "softmax is not weighted": ("cross_entropy", "softmax_gradient", "grad = tl.exp(value - log) - (column == label).to(tl.float32)", "grad = tl.exp(value - log) / weight - (column == label).to(tl.float32)"),
    "the largest has no loss of its own": ("cross_entropy", "softmax_gradient", "        if TOP:\n            grad +=", "        if TOP:\n            grad + "),
    "no weights are published": ("adamw", "adamw", "if OTHER == \"publish\":", "if OTHER == \"nothing\":"),
    "weights are published twice as large": ("adamw", "adamw", "weight.to(other.dtype", "(2 * weight).to(other.dtype"),
    "old weights are published": ("adamw", "adamw", "        weight *= decay\n", "        if OTHER == \"publish\":\n            tl.store(other + at, weight.to(tl.bfloat16), mask=inside)\n            other = param\n        weight *= decay\n"),
    "does not compile": ("swiglu", "swiglu", "sigmoid = tl.sigmoid(gate)", "sigmoid = tl.no_such_function(gate)"),
}  # fmt: skip
# ruff: noqa: E501  (the table of mutants)


def refusal(op: str, kernel=None, dtype: torch.dtype = torch.float16, sizes: Sizes = SIZES) -> str | None:
    kernel = IMPLEMENTATIONS[op]["triton"] if kernel is None else kernel
    return why_refused(op, kernel, device=DEVICE, dtype=dtype, sizes=sizes)


def mutated(folder: Path, name: str, right: str, wrong: str) -> ModuleType:
    """The kernel file ``name`` with another line, as a module."""
    right_file = importlib.util.find_spec(f"megatron_aquila.kernels.triton.{name}")
    source = Path(right_file.origin).read_text(encoding="utf-8")
    assert right in source, f"{name} has no {right!r}"
    (folder / f"mutant_{name}.py").write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"mutant_{name}", folder / f"mutant_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_in(monkeypatch: pytest.MonkeyPatch, mutant: ModuleType, name: str) -> None:
    module = importlib.import_module(f"megatron_aquila.kernels.triton.{name}")
    for attribute in ("RmsNorm", "AddRmsNorm", "SwiGLU", "RopeQkv", "statistics", "gradient_", "update_"):
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, getattr(mutant, attribute))


def test_every_triton_kernel_has_a_trial() -> None:
    assert set(TRIALS) == {"attention", *OPS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_right_kernels_pass(op: str, dtype: torch.dtype) -> None:
    assert refusal(op, dtype=dtype) is None


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_right_kernels_pass_in_llamas_order(op: str) -> None:
    assert refusal(op, sizes=Sizes(hidden_size=48, norm_order="llama"), dtype=torch.bfloat16) is None


@pytest.mark.parametrize("what", MUTANTS)
def test_wrong_kernels_are_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, whose bounds are the widest."""
    name, op, right, wrong = MUTANTS[what]
    put_in(monkeypatch, mutated(tmp_path, name, right, wrong), name)
    why = refusal(op, dtype=torch.bfloat16)
    assert why is not None
    assert why.startswith("it fails: ") == (what == "does not compile")


def test_a_refused_kernel_is_named_loudly_and_another_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the interpreter in its place."""
    put_in(monkeypatch, mutated(tmp_path, "swiglu", "silu * (1.0 - sigmoid)", "gate * (1.0 - sigmoid)"), "swiglu")
    preferences = {
        **dispatch._preferences(DEVICE, SIZES),
        "swiglu": {"triton": "fast", "own": "lean"},
        "rms_norm": {"triton": "fast"},
    }
    monkeypatch.setattr(dispatch, "_preferences", lambda device, sizes: preferences)
    told = r"swiglu=triton is refused, .*: the gradient of gate_up is wrong in \d+ of \d+ places.*; swiglu=own runs instead"
    with pytest.warns(RuntimeWarning, match=told):
        kernels = choose_kernels(DEVICE, torch.float32, sizes=SIZES)
    assert kernels.swiglu is IMPLEMENTATIONS["swiglu"]["own"]
    assert kernels.reasons["swiglu"].startswith("own: swiglu=triton is refused, here it does not do what its reference")
    assert (kernels.rms_norm, kernels.reasons["rms_norm"]) == (IMPLEMENTATIONS["rms_norm"]["triton"], "triton: fast")
    with pytest.raises(ConfigError, match=r"--kernels swiglu=triton: swiglu=triton is refused.*; leave it out"):
        choose_kernels(DEVICE, torch.float32, forced={"swiglu": "triton"}, sizes=SIZES)


def test_where_nothing_runs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_preferences", lambda device, sizes: {"rms_norm": {"triton": "fast"}})
    with pytest.raises(AssertionError, match=f"no rms_norm kernel runs on {DEVICE}: .*Triton has no float64"):
        choose_kernels(DEVICE, torch.float64)


def test_the_runs_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    assert refusal("swiglu") is None
    assert torch.equal(torch.get_rng_state(), before)


def test_all_can_be_forced_at_once() -> None:
    forced = dict.fromkeys(OPS, "triton")
    kernels = choose_kernels(DEVICE, torch.bfloat16, forced=forced, sizes=SIZES)
    assert all(getattr(kernels, op) is IMPLEMENTATIONS[op]["triton"] for op in OPS)
    assert {kernels.reasons[op] for op in OPS} == {"triton: asked for"}
