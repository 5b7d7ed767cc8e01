import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels import dispatch
from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_native_, adamw_torch_
from megatron_aquila.kernels.attention import causal_attention, causal_attention_reference
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels
from megatron_aquila.kernels.rms_norm import rms_norm, rms_norm_torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IS_BUILT = find_spec("megatron_aquila._native") is not None
needs_extension = pytest.mark.skipif(not IS_BUILT, reason="the C++ extension is not built: setup.py build_ext")
NO_TRITON = "Triton cannot be imported: ModuleNotFoundError: import of triton halted; None in sys.modules"


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is installed: its kernels are tried in triton/test_self_check.py."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def every_attention_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU that is not here; which one is chosen, and why, is tried in test_attention_choice.py."""
    monkeypatch.setattr(dispatch, "attention_preferences", lambda device, sizes: {"sdpa": "as on a CPU"})
    monkeypatch.setattr(dispatch, "why_refused", lambda *args, **kwargs: None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Make a package importable that has the given attributes."""

    def stand_in(name: str, **attributes: object) -> None:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return stand_in


def test_on_a_cpu_all_are_ours_and_every_op_has_a_reason() -> None:
    kernels = choose_kernels(CPU, torch.bfloat16)
    assert (kernels.rms_norm, kernels.attention) == (rms_norm, causal_attention)
    assert set(kernels.reasons) == set(IMPLEMENTATIONS)
    assert all(": " in reason and "\n" not in reason for reason in kernels.reasons.values())


def test_on_a_gpu_without_optional_packages() -> None:
    kernels = choose_kernels(CUDA, torch.bfloat16)
    assert (kernels.rms_norm, kernels.adamw) == (rms_norm_torch, adamw_torch_)
    missing = "cannot be imported: ModuleNotFoundError: No module named"
    assert kernels.reasons["rms_norm"] == f"torch: {NO_TRITON}"
    assert kernels.reasons["adamw"] == f"torch_fused: {NO_TRITON}; NVIDIA apex {missing} 'apex'"


def test_optional_packages_are_used_where_they_fit(install) -> None:
    install("apex")
    install("apex.multi_tensor_apply", multi_tensor_applier=object)
    install("amp_C", multi_tensor_adam_capturable=object)
    assert choose_kernels(CUDA, torch.bfloat16).adamw is adamw_apex_
    kernels = choose_kernels(CUDA, torch.float64)
    assert kernels.adamw is adamw_torch_
    assert kernels.reasons["adamw"] == "torch_fused: Triton has no float64; NVIDIA apex has no float64"


def test_the_native_adamw_is_for_the_hosts_float32(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("megatron_aquila._native", adamw=lambda *_, **__: None)
    errs = "adamw=native is refused, here it does not do what its reference does: it errs; adamw=own runs instead"
    monkeypatch.setattr(dispatch, "why_refused", lambda op, *args, **kwargs: "it errs" if op == "adamw" else None)
    with pytest.warns(RuntimeWarning, match=errs):
        kernels = choose_kernels(CPU, torch.bfloat16)
    assert kernels.adamw is adamw_
    install("megatron_aquila._native")
    why = "the C++ extension cannot be imported: AttributeError"
    assert choose_kernels(CPU, torch.float32).reasons["adamw"].startswith(f"own: {why}")
    kernels = choose_kernels(CPU, torch.float64)
    assert (kernels.adamw, kernels.reasons["adamw"]) == (adamw_, "own: the C++ extension has no float64")
    with pytest.raises(ConfigError, match="adamw=native: the C\\+\\+ extension works in the host's memory"):
        choose_kernels(CUDA, torch.bfloat16, forced={"adamw": "native"})


@needs_extension
def test_where_the_extension_is_built_a_host_updates_with_it() -> None:
    assert choose_kernels(CPU, torch.bfloat16).adamw is adamw_native_


def test_a_package_without_the_kernel_is_not_used(install) -> None:
    """flash-attn-4 alone has only flash_attn.cute; PyPI's apex is another project; apex can be built without CUDA."""
    install("flash_attn")
    why = "flash_attn cannot be imported: AttributeError: module 'flash_attn' has no attribute 'flash_attn_func'"
    with pytest.raises(ConfigError, match=f"--kernels attention=flash_attn: {why}; "):
        choose_kernels(CUDA, torch.bfloat16, forced={"attention": "flash_attn"})
    install("apex")
    kernels = choose_kernels(CUDA, torch.bfloat16)
    assert kernels.adamw is adamw_torch_
    assert "No module named 'apex.multi_tensor_apply'" in kernels.reasons["adamw"]
    install("apex.multi_tensor_apply", multi_tensor_applier=object)
    kernels = choose_kernels(CUDA, torch.bfloat16)
    assert kernels.adamw is adamw_torch_
    assert kernels.reasons["adamw"].endswith("No module named 'amp_C'")


def test_a_package_built_for_another_torch_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('flash_attn_2_cuda.so:\\n undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    why = "flash_attn cannot be imported: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10; "
    with pytest.raises(ConfigError, match=f"--kernels attention=flash_attn: {why}"):
        choose_kernels(CUDA, torch.bfloat16, forced={"attention": "flash_attn"})


def test_a_kernel_can_be_asked_for() -> None:
    kernels = choose_kernels(CPU, torch.float32, forced={"attention": "reference"})
    assert kernels.attention is causal_attention_reference
    assert kernels.reasons["attention"] == "reference: asked for"


@pytest.mark.parametrize(
    ("device", "op", "name", "message"),
    [
        (CPU, "attn", "sdpa", f"there is no op 'attn'; use one of {', '.join(IMPLEMENTATIONS)}"),
        (CPU, "attention", "fast", "there is no attention kernel 'fast'; use one of sdpa, sdpa_cudnn, sdpa_flash, "),
        (CPU, "attention", "flash_attn", "flash_attn needs a GPU; leave it out"),
        (CUDA, "adamw", "apex", "NVIDIA apex cannot be imported: ModuleNotFoundError"),
        (CUDA, "rms_norm", "triton", NO_TRITON),
        (CPU, "swiglu", "triton", "Triton needs a GPU; leave it out"),
    ],
)
def test_what_cannot_be_had_is_refused(device: torch.device, op: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_kernels(device, torch.bfloat16, forced={"rms_norm": "reference", op: name})
    assert str(error.value).startswith(f"--kernels {op}={name}: {message}")


def test_triton_never_interprets_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (
        choose_kernels(CUDA, torch.bfloat16).reasons["swiglu"] == "own: Triton is set to interpret by TRITON_INTERPRET"
    )
