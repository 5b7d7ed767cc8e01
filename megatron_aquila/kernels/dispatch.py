"""Which kernel runs where, and why. Chosen once at start and logged; nothing falls back later in silence."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_torch_
from megatron_aquila.kernels.attention import causal_attention, causal_attention_flash, causal_attention_reference
from megatron_aquila.kernels.rms_norm import Order, rms_norm, rms_norm_reference, rms_norm_torch
from megatron_aquila.kernels.rope import apply_rope
from megatron_aquila.kernels.swiglu import swiglu, swiglu_reference


class RmsNorm(Protocol):
    """The signature of ``rms_norm``."""

    def __call__(self, x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
        """``x / rms(x) * weight``."""
        ...


class AdamWUpdate(Protocol):
    """The signature of ``adamw_``."""

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """One update in place."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The kernels of a run. ``reasons`` says for each op which one was chosen and why, in a line for the log."""

    rms_norm: RmsNorm
    apply_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    adamw: AdamWUpdate
    reasons: Mapping[str, str]


IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "rms_norm": {"own": rms_norm, "torch": rms_norm_torch, "reference": rms_norm_reference},
        "apply_rope": {"own": apply_rope},
        "swiglu": {"own": swiglu, "reference": swiglu_reference},
        "attention": {
            "sdpa": causal_attention,
            "flash_attn": causal_attention_flash,
            "reference": causal_attention_reference,
        },
        "adamw": {"own": adamw_, "torch_fused": adamw_torch_, "apex": adamw_apex_},
    }
)


def choose_kernels(device: torch.device, dtype: torch.dtype, *, forced: Mapping[str, str] | None = None) -> Kernels:
    """The kernels for activations of ``dtype`` on ``device``. ``forced`` maps an op to a name of ``IMPLEMENTATIONS``.

    The optional packages flash_attn and NVIDIA's apex are used where they are installed and fit.
    """
    forced = {} if forced is None else forced
    for op, name in forced.items():
        assert op in IMPLEMENTATIONS, f"no op {op!r}; there are {', '.join(IMPLEMENTATIONS)}"
        assert name in IMPLEMENTATIONS[op], f"no {op} kernel {name!r}; there are {', '.join(IMPLEMENTATIONS[op])}"
    names, reasons = {}, {}
    for op, (name, why) in _preferences(device, dtype).items():
        names[op] = forced.get(op, name)
        reasons[op] = f"{names[op]}: {'asked for' if op in forced else why}"
    chosen = {op: IMPLEMENTATIONS[op][name] for op, name in names.items()}
    return Kernels(**chosen, reasons=MappingProxyType(reasons))


def has_flash_attn() -> bool:
    """Whether the package flash_attn is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def has_apex() -> bool:
    """Whether NVIDIA's apex is installed; the PyPI project of that name is another one and has no FusedAdam."""
    if importlib.util.find_spec("apex") is None:
        return False
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except ImportError:
        return False


def _preferences(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """For each op the kernel to use and why."""
    on_gpu = device.type == "cuda"
    only = ("own", "the only one")
    return {
        "rms_norm": ("torch", "one fused pass on a GPU") if on_gpu else ("own", "keeps no float32 copy for backward"),
        "apply_rope": only,
        "swiglu": ("own", "keeps no float32 copy for backward"),
        "attention": _attention_preference(on_gpu, dtype),
        "adamw": _adamw_preference(on_gpu, dtype),
    }


def _attention_preference(on_gpu: bool, dtype: torch.dtype) -> tuple[str, str]:
    if not on_gpu:
        return "sdpa", "torch's flash attention for CPUs"
    if dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", f"flash_attn has no {str(dtype).removeprefix('torch.')}"
    if not has_flash_attn():
        return "sdpa", "flash_attn is not installed"
    return "flash_attn", "it is installed"


def _adamw_preference(on_gpu: bool, dtype: torch.dtype) -> tuple[str, str]:
    if not on_gpu:
        return "own", "on a CPU torch's fused kernel rounds differently when shards change"
    if dtype == torch.float64:
        return "torch_fused", "apex has no float64"
    if not has_apex():
        return "torch_fused", "NVIDIA apex is not installed"
    return "apex", "NVIDIA apex is installed"
