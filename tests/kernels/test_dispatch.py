import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_torch_
from megatron_aquila.kernels.attention import causal_attention, causal_attention_flash, causal_attention_reference
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels, has_apex
from megatron_aquila.kernels.rms_norm import rms_norm, rms_norm_torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    assert (kernels.rms_norm, kernels.attention, kernels.adamw) == (rms_norm, causal_attention, adamw_)
    assert set(kernels.reasons) == set(IMPLEMENTATIONS)
    assert all(": " in reason and "\n" not in reason for reason in kernels.reasons.values())


def test_on_a_gpu_without_optional_packages() -> None:
    kernels = choose_kernels(CUDA, torch.bfloat16)
    assert (kernels.rms_norm, kernels.attention, kernels.adamw) == (rms_norm_torch, causal_attention, adamw_torch_)
    assert kernels.reasons["attention"] == "sdpa: flash_attn is not installed"
    assert kernels.reasons["adamw"] == "torch_fused: NVIDIA apex is not installed"


def test_optional_packages_are_used_where_they_fit(install) -> None:
    install("flash_attn")
    install("apex")
    install("apex.optimizers", FusedAdam=object)
    kernels = choose_kernels(CUDA, torch.bfloat16)
    assert (kernels.attention, kernels.adamw) == (causal_attention_flash, adamw_apex_)
    kernels = choose_kernels(CUDA, torch.float64)
    assert (kernels.attention, kernels.adamw) == (causal_attention, adamw_torch_)
    assert kernels.reasons["attention"] == "sdpa: flash_attn has no float64"
    assert choose_kernels(CPU, torch.bfloat16).attention is causal_attention


def test_the_other_apex_is_not_nvidias(install) -> None:
    assert not has_apex()
    install("apex")  # the PyPI project: importable, without optimizers
    assert not has_apex()
    install("apex.optimizers")
    assert not has_apex()


def test_a_kernel_can_be_asked_for() -> None:
    kernels = choose_kernels(CPU, torch.float32, forced={"attention": "reference"})
    assert kernels.attention is causal_attention_reference
    assert kernels.reasons["attention"] == "reference: asked for"


@pytest.mark.parametrize(
    ("forced", "message"),
    [({"attn": "sdpa"}, "no op 'attn'; there are rms_norm"), ({"attention": "fast"}, "no attention kernel 'fast'")],
)
def test_unknown_names_are_refused(forced: dict[str, str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        choose_kernels(CPU, torch.float32, forced=forced)
