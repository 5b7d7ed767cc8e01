"""Which kernel runs where, and why. Chosen once at start and logged; nothing falls back later in silence."""

import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.kernels.adamw import adamw_, adamw_apex_, adamw_native_, adamw_torch_, adamw_triton_
from megatron_aquila.kernels.attention import (
    causal_attention,
    causal_attention_cudnn,
    causal_attention_efficient,
    causal_attention_flash,
    causal_attention_flash_3,
    causal_attention_flash_4,
    causal_attention_reference,
    causal_attention_torch_flash,
)
from megatron_aquila.kernels.attention_blocks import SCORE_BLOCKS
from megatron_aquila.kernels.attention_choice import LONGEST_PLAIN, attention_preferences, why_attention_refused
from megatron_aquila.kernels.blocks import BLOCKS_CPU, BLOCKS_EFFICIENT, BLOCKS_FLASH, BLOCKS_REFERENCE
from megatron_aquila.kernels.compiled import compiled
from megatron_aquila.kernels.cross_entropy import (
    softmax_gradient_,
    softmax_gradient_triton_,
    softmax_statistics,
    softmax_statistics_triton,
)
from megatron_aquila.kernels.ops import Kernels
from megatron_aquila.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    add_rms_norm_torch,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_torch,
    rms_norm_triton,
)
from megatron_aquila.kernels.rope import rope_qkv_, rope_qkv_triton_
from megatron_aquila.kernels.self_check import Sizes, why_refused
from megatron_aquila.kernels.swiglu import swiglu, swiglu_reference, swiglu_triton

Share = Callable[[dict[str, str]], Sequence[Mapping[str, str]]]  # what this rank tells -> what each rank tells

IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "rms_norm": {
            "own": rms_norm,
            "torch": rms_norm_torch,
            "triton": rms_norm_triton,
            "compiled": compiled(rms_norm_reference),
            "reference": rms_norm_reference,
        },
        "add_rms_norm": {
            "own": add_rms_norm,
            "torch": add_rms_norm_torch,
            "triton": add_rms_norm_triton,
            "compiled": compiled(add_rms_norm_reference),
            "reference": add_rms_norm_reference,
        },
        "rope_qkv": {"own": rope_qkv_, "triton": rope_qkv_triton_, "compiled": compiled(rope_qkv_)},
        "swiglu": {
            "own": swiglu,
            "triton": swiglu_triton,
            "compiled": compiled(swiglu_reference),
            "reference": swiglu_reference,
        },
        "attention": {
            "sdpa": causal_attention,
            "sdpa_cudnn": causal_attention_cudnn,
            "sdpa_flash": causal_attention_torch_flash,
            "sdpa_efficient": causal_attention_efficient,
            "flash_attn": causal_attention_flash,
            "flash_attn_3": causal_attention_flash_3,
            "flash_attn_4": causal_attention_flash_4,
            "score_blocks": SCORE_BLOCKS,
            "reference": causal_attention_reference,
            "blocks": BLOCKS_CPU,
            "blocks_flash": BLOCKS_FLASH,
            "blocks_efficient": BLOCKS_EFFICIENT,
            "blocks_reference": BLOCKS_REFERENCE,
        },
        "softmax_statistics": {"own": softmax_statistics, "triton": softmax_statistics_triton},
        "softmax_gradient": {"own": softmax_gradient_, "triton": softmax_gradient_triton_},
        "adamw": {
            "own": adamw_,
            "native": adamw_native_,
            "torch_fused": adamw_torch_,
            "apex": adamw_apex_,
            "triton": adamw_triton_,
        },
    }
)


@dataclass(frozen=True, slots=True)
class OptionalPackage:
    """A package that is used where it is installed: the dtypes its kernel takes, and the names we import from it.

    ``takes``: a function of those, and the keywords we give to it. ``device``: the type of those it runs on.
    """

    title: str
    dtypes: frozenset[torch.dtype]
    needs: tuple[tuple[str, str], ...]
    takes: tuple[tuple[str, str], ...] = ()
    device: str = "cuda"


HALF = frozenset((torch.bfloat16, torch.float16))
FLASH_TAKES = (
    ("flash_attn_func", "causal"),
    ("flash_attn_varlen_func", "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k causal"),
)
TRUE = ("1", "on", "true", "y", "yes")  # what Triton takes for a yes in an environment variable

OPTIONAL: Mapping[str, OptionalPackage] = MappingProxyType(
    {
        "sdpa_cudnn": OptionalPackage("cuDNN's attention", HALF, ()),
        "sdpa_flash": OptionalPackage(
            "torch's flash attention",
            HALF,
            (("torch.nn.attention.varlen", "varlen_attn"),),
            (("varlen_attn", "window_size"),),
        ),
        "sdpa_efficient": OptionalPackage("torch's memory-efficient attention", HALF | {torch.float32}, ()),
        "blocks_flash": OptionalPackage("torch's flash attention", HALF, ()),
        "blocks_efficient": OptionalPackage("torch's memory-efficient attention", HALF | {torch.float32}, ()),
        **{
            name: OptionalPackage(title, HALF, tuple((module, function) for function, _ in FLASH_TAKES), FLASH_TAKES)
            for name, title, module in (
                ("flash_attn", "flash_attn", "flash_attn"),
                ("flash_attn_3", "flash attention 3", "flash_attn_interface"),
                ("flash_attn_4", "flash attention 4", "flash_attn.cute"),
            )
        },
        "apex": OptionalPackage(  # for weights of these types the optimizer's own tensors are float32
            "NVIDIA apex",
            frozenset((torch.bfloat16, torch.float16, torch.float32)),
            (("apex.multi_tensor_apply", "multi_tensor_applier"), ("amp_C", "multi_tensor_adam_capturable")),
        ),
        "triton": OptionalPackage(
            "Triton",
            frozenset((torch.bfloat16, torch.float16, torch.float32)),
            (("triton", "jit"), ("triton.language", "sqrt_rn")),
        ),
        "native": OptionalPackage(  # for weights of these types the optimizer's own tensors are float32
            "the C++ extension",
            frozenset((torch.bfloat16, torch.float16, torch.float32)),
            (("megatron_aquila._native", "adamw"),),
            device="cpu",
        ),
    }
)


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    forced: Mapping[str, str] | None = None,
    sizes: Sizes = Sizes(),
    share: Share = lambda mine: [mine],
) -> Kernels:
    """The kernels for activations of ``dtype`` on ``device``. ``forced`` maps an op to a name of ``IMPLEMENTATIONS``.

    The optional packages flash_attn, NVIDIA's apex and Triton are used where they fit and can be imported. Each of our
    Triton and C++ kernels, each compiled one, and on a GPU each attention, must first show on this device, at
    ``sizes``, that it computes what its reference does: one that does not is refused with a warning. All ranks choose
    alike: what cannot run on one, as ``share`` tells, runs on none. Raises ``ConfigError`` on every rank for a forced
    op or name that does not exist, cannot run or is refused, and where no attention is left for ``sizes``.
    """
    forced = {} if forced is None else forced
    problems = [problem for op, name in forced.items() for problem in _unknown(op, name)]
    if problems:
        raise ConfigError(problems)
    candidates = {
        op: {forced[op]: "asked for"} if op in forced else names for op, names in _preferences(device, sizes).items()
    }
    refusals = _survey(candidates, device, dtype, sizes, share)
    choices = [f"{op}={name}" for op, name in forced.items()]
    if problems := [_problem(choice, refusals[choice].why) for choice in choices if choice in refusals]:
        raise ConfigError(problems)
    chosen, reasons = {}, {}
    for op, names in candidates.items():
        name, why = _first_fit(op, names, refusals, device, sizes)
        chosen[op], reasons[op] = IMPLEMENTATIONS[op][name], f"{name}: {why}"
    return Kernels(**chosen, reasons=MappingProxyType(reasons))


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a kernel runs on no rank, in a line. ``is_news`` where that could not be expected of these machines."""

    why: str
    is_news: bool


def _survey(
    candidates: Mapping[str, Mapping[str, str]], device: torch.device, dtype: torch.dtype, sizes: Sizes, share: Share
) -> dict[str, _Refusal]:
    """What may not run on any rank, by ``op=name``. An op's candidates are tried in turn, until one fits all ranks.

    Every rank takes the same number of rounds: the refusals known after each are the same everywhere.
    """

    @cache
    def here(op: str, name: str) -> _Refusal | None:
        if (why := why_unfit(name, device, dtype)) is not None:
            return _Refusal(why, is_news=False)
        why = _refusal(op, name, device, dtype, sizes)
        return None if why is None else _Refusal(why, is_news=True)

    mine, everywhere = dict[str, _Refusal](), dict[str, _Refusal]()
    while True:
        for op, names in candidates.items():
            for name in names:
                if (choice := f"{op}={name}") in everywhere:
                    continue
                if (refusal := here(op, name)) is None:
                    break
                mine[choice] = refusal
        everyone = share({choice: refusal.why for choice, refusal in mine.items()})
        known, everywhere = everywhere, {choice: _joint(choice, mine, everyone) for one in everyone for choice in one}
        if everywhere.keys() == known.keys():
            return everywhere


def _joint(choice: str, mine: Mapping[str, _Refusal], everyone: Sequence[Mapping[str, str]]) -> _Refusal:
    """What is wrong with ``choice`` here, or on the first rank where something is. That ranks differ is news."""
    if choice in mine:
        return replace(mine[choice], is_news=mine[choice].is_news or any(choice not in one for one in everyone))
    rank = next(rank for rank, one in enumerate(everyone) if choice in one)
    return _Refusal(f"{choice} does not run on rank {rank}: {everyone[rank][choice]}", is_news=True)


def _first_fit(
    op: str, names: Mapping[str, str], refusals: Mapping[str, _Refusal], device: torch.device, sizes: Sizes
) -> tuple[str, str]:
    """The first candidate that can run, and why: its own reason, or what is wrong with those before it."""
    before: list[_Refusal] = []
    for name, why in names.items():
        if f"{op}={name}" not in refusals:
            before.sort(key=lambda refusal: not refusal.is_news)
            for refusal in before:
                if refusal.is_news:  # on every rank, in addition to the first rank's list of kernels
                    warnings.warn(f"kernels: {refusal.why}; {op}={name} runs instead", RuntimeWarning, stacklevel=3)
            return name, "; ".join(refusal.why for refusal in before) or why
        before.append(refusals[f"{op}={name}"])
    why = f"no {op} kernel runs on {device}: {'; '.join(refusal.why for refusal in before)}"
    assert op == "attention", why
    way_out = f"use --precision bf16, or samples of at most {LONGEST_PLAIN} tokens"
    raise ConfigError([Problem("--seq-len", sizes.seq_len, why, way_out)])


def _unknown(op: str, name: str) -> list[Problem]:
    """What is wrong with the words ``op=name``."""
    if op not in IMPLEMENTATIONS:
        return [_problem(f"{op}={name}", f"there is no op {op!r}", f"use one of {', '.join(IMPLEMENTATIONS)}")]
    if name not in IMPLEMENTATIONS[op]:
        way_out = f"use one of {', '.join(IMPLEMENTATIONS[op])}"
        return [_problem(f"{op}={name}", f"there is no {op} kernel {name!r}", way_out)]
    return []


def _problem(
    choice: str, why: str, way_out: str = "leave it out: without it the best kernel that runs here is chosen"
) -> Problem:
    return Problem("--kernels", choice, why, way_out)


def _refusal(op: str, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    """Why a kernel that depends on compiler, driver or library is not trusted here, in a line; None if it is."""
    if op == "attention" and (why := why_attention_refused(name, device=device, dtype=dtype, sizes=sizes)) is not None:
        return f"attention={name} is refused, {why}"
    ours_or_made = name in ("triton", "native", "compiled")
    if name == "reference" or not (ours_or_made or (op, device.type) == ("attention", "cuda")):
        return None
    why = why_refused(op, IMPLEMENTATIONS[op][name], device=device, dtype=dtype, sizes=sizes)
    return None if why is None else f"{op}={name} is refused, here it does not do what its reference does: {why}"


def why_unfit(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel ``name`` cannot run here, in a line; None if it can.

    Its package is imported and not just looked up: one of that name may lack the kernel (flash-attn-4 brings only
    ``flash_attn.cute``, PyPI's apex is another project) or be built for another torch, and it is too late to learn that
    in the first forward.
    """
    if name not in OPTIONAL:
        return None
    optional = OPTIONAL[name]
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET", "").lower() in TRUE
    if device.type != ("cpu" if interpreted else optional.device):  # the interpreter is for nothing but tests
        needs = "needs a GPU" if optional.device == "cuda" else "works in the host's memory"
        return f"{optional.title} " + ("is set to interpret by TRITON_INTERPRET" if interpreted else needs)
    if dtype not in optional.dtypes:
        return f"{optional.title} has no {str(dtype).removeprefix('torch.')}"
    for module, attribute in optional.needs:
        try:
            found = getattr(importlib.import_module(module), attribute)
            words = dict(optional.takes).get(attribute, "").split()
            missing = [word for word in words if word not in inspect.signature(found).parameters]
        except Exception as error:  # a package that does not fit its surroundings may raise anything
            return f"{optional.title} cannot be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        if missing:
            return f"{optional.title} is of another version: {attribute} does not take {' '.join(missing)}"
    return None


def _preferences(device: torch.device, sizes: Sizes) -> dict[str, dict[str, str]]:
    """For each op the kernels to try in turn, the last of which always runs, and why."""
    only, lean = {"own": "the only one"}, {"own": "keeps no float32 copy for backward"}
    attention = attention_preferences(device, sizes)
    if device.type != "cuda":
        native = {"native": "one pass over memory, whose bits no shard's border changes"}
        own = {"own": "torch's fused kernel rounds differently on a CPU when shards change"}
        return {
            "rms_norm": lean,
            "add_rms_norm": lean,
            "rope_qkv": only,
            "swiglu": lean,
            "attention": attention,
            "softmax_statistics": only,
            "softmax_gradient": only,
            "adamw": {**native, **own} if device.type == "cpu" else own,
        }
    triton = {"triton": "one pass over memory, and it agrees with its reference on this device"}
    norm = {**triton, "torch": "one fused pass on a GPU"}
    return {
        "rms_norm": norm,
        "add_rms_norm": norm,
        "rope_qkv": {**triton, **only},
        "swiglu": {**triton, **lean},
        "attention": attention,
        "softmax_statistics": {**triton, **only},
        "softmax_gradient": {**triton, **only},
        "adamw": {**triton, "apex": "NVIDIA apex is installed", "torch_fused": "one pass over memory"},
    }
