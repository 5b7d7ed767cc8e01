"""Which kernel runs where, and why. Chosen once at start and logged; nothing falls back later in silence."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_torch_
from megatron_aquila.kernels.attention import causal_attention, causal_attention_flash, causal_attention_reference
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.rms_norm import Order, rms_norm, rms_norm_reference, rms_norm_torch
from megatron_aquila.kernels.rope import apply_rope
from megatron_aquila.kernels.swiglu import swiglu, swiglu_reference


class RmsNorm(Protocol):
    """The signature of ``rms_norm``."""

    def __call__(self, x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
        """``x / rms(x) * weight``."""
        ...


class CausalAttention(Protocol):
    """The signature of ``causal_attention``."""

    def __call__(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
        """``softmax(q k^T / sqrt(D)) v`` over the earlier tokens, of the same document where documents are given."""
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
    attention: CausalAttention
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


@dataclass(frozen=True, slots=True)
class OptionalPackage:
    """A package that is used where it is installed: the dtypes its kernel takes, and the names we import from it."""

    title: str
    dtypes: frozenset[torch.dtype]
    needs: tuple[tuple[str, str], ...]


OPTIONAL: Mapping[str, OptionalPackage] = MappingProxyType(
    {
        "flash_attn": OptionalPackage(
            "flash_attn",
            frozenset((torch.bfloat16, torch.float16)),
            (("flash_attn", "flash_attn_func"), ("flash_attn", "flash_attn_varlen_func")),
        ),
        "apex": OptionalPackage(  # for weights of these types the optimizer's own tensors are float32
            "NVIDIA apex",
            frozenset((torch.bfloat16, torch.float16, torch.float32)),
            (("apex.multi_tensor_apply", "multi_tensor_applier"), ("amp_C", "multi_tensor_adam")),
        ),
    }
)


def choose_kernels(device: torch.device, dtype: torch.dtype, *, forced: Mapping[str, str] | None = None) -> Kernels:
    """The kernels for activations of ``dtype`` on ``device``. ``forced`` maps an op to a name of ``IMPLEMENTATIONS``.

    The optional packages flash_attn and NVIDIA's apex are used where they fit and can be imported. Raises
    ``ConfigError`` for a forced op or name that does not exist, or that cannot run here.
    """
    forced = {} if forced is None else forced
    problems = [problem for op, name in forced.items() for problem in _problems(op, name, device, dtype)]
    if problems:
        raise ConfigError(problems)
    names, reasons = {}, {}
    for op, (name, why) in _preferences(device, dtype).items():
        names[op] = forced.get(op, name)
        reasons[op] = f"{names[op]}: {'asked for' if op in forced else why}"
    chosen = {op: IMPLEMENTATIONS[op][name] for op, name in names.items()}
    return Kernels(**chosen, reasons=MappingProxyType(reasons))


def _problems(op: str, name: str, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """What is wrong with asking for kernel ``name`` of ``op``."""
    if op not in IMPLEMENTATIONS:
        why, way_out = f"there is no op {op!r}", f"use one of {', '.join(IMPLEMENTATIONS)}"
    elif name not in IMPLEMENTATIONS[op]:
        why, way_out = f"there is no {op} kernel {name!r}", f"use one of {', '.join(IMPLEMENTATIONS[op])}"
    elif (unfit := _unfit(name, device, dtype)) is not None:
        why, way_out = unfit, "leave it out: without it the best kernel that runs here is chosen"
    else:
        return []
    return [Problem("--kernels", f"{op}={name}", why, way_out)]


def _unfit(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel ``name`` cannot run here, in a line; None if it can.

    Its package is imported and not just looked up: one of that name may lack the kernel (flash-attn-4 brings only
    ``flash_attn.cute``, PyPI's apex is another project) or be built for another torch, and it is too late to learn that
    in the first forward.
    """
    if name not in OPTIONAL:
        return None
    optional = OPTIONAL[name]
    if device.type != "cuda":
        return f"{optional.title} needs a GPU"
    if dtype not in optional.dtypes:
        return f"{optional.title} has no {str(dtype).removeprefix('torch.')}"
    for module, attribute in optional.needs:
        try:
            getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a package that does not fit its surroundings may raise anything
            return f"{optional.title} cannot be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    return None


def _preferences(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """For each op the kernel to use and why."""
    only, lean = ("own", "the only one"), ("own", "keeps no float32 copy for backward")
    if device.type != "cuda":
        attention = "sdpa", "torch's flash attention for CPUs"
        adamw = "own", "on a CPU torch's fused kernel rounds differently when shards change"
        return {"rms_norm": lean, "apply_rope": only, "swiglu": lean, "attention": attention, "adamw": adamw}
    return {
        "rms_norm": ("torch", "one fused pass on a GPU"),
        "apply_rope": only,
        "swiglu": lean,
        "attention": _optional_or("flash_attn", "sdpa", device, dtype),
        "adamw": _optional_or("apex", "torch_fused", device, dtype),
    }


def _optional_or(name: str, otherwise: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    unfit = _unfit(name, device, dtype)
    return (name, f"{OPTIONAL[name].title} is installed") if unfit is None else (otherwise, unfit)
