"""At start, a kernel shows on the device that it computes what its reference does: GPUs, drivers and compilers differ.

A trial runs it forward and backward on random data, at the run's own sizes, against the reference in float64.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.kernels.adamw import adamw_
from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.cross_entropy import softmax_gradient_, softmax_statistics
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.precision import compute_dtype
from megatron_aquila.kernels.remainder import join, split
from megatron_aquila.kernels.rms_norm import Order, add_rms_norm_reference, rms_norm_reference
from megatron_aquila.kernels.rope import rope_qkv_, rope_tables
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.kernels.swiglu import swiglu_reference

EPS = 1e-5
# A gradient of attention sums products of weights and scores' gradients, rounded before: where few keys share a query
# nearly all cancels but their errors. Of millions the largest is at 10 roundings, all together at 0.2 to 2.4, measured
# with torch's flash attention for CPUs; the smallest mistake of the tests, scores a tenth too large, is at 9 together.
PEAK = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What kernels are compiled for, and so are tried at: the run's own. ``by_blocks``: attention is."""

    hidden_size: int = 96
    ffn_size: int = 80
    head_dim: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    seq_len: int = 256
    has_documents: bool = False
    by_blocks: bool = False
    norm_order: Order = "aquila"
    interleaved: bool = False
    scores: Scores | None = None

    @property
    def alters_scores(self) -> bool:
        """Whether attention has to do more than to take scores."""
        return self.scores is not None and self.scores.alters


@dataclass(frozen=True, slots=True)
class Trial:
    """``call(kernel, **inputs)`` gives outputs by name, ``inputs`` have gradients where the outputs do.

    Inputs that optimizers keep in float32 are ``always_wide``. An error is allowed ``roundings`` to the type of the
    inputs and ``sums`` to float32. It is measured against its row; or where a row may cancel to nothing, as softmax's
    gradient does, all errors of the ``whole`` tensor together against all values, and each against ``PEAK`` times that.
    """

    reference: Callable[..., Any]
    inputs: Mapping[str, Tensor]
    call: Callable[..., Mapping[str, Tensor]]
    always_wide: bool = False
    roundings: int = 4
    sums: int = 32
    whole: bool = False


class _Draw:
    """Normal float64 numbers on ``device``, the same each time; the run's own generators are left alone."""

    def __init__(self, device: torch.device) -> None:
        self._generator, self._device = torch.Generator().manual_seed(0), device
        # on a GPU more rows than programs, so that each takes several; the interpreter needs few and is slow
        self.tokens = (111, 7) if device.type == "cuda" else (4, 2)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64).to(self._device)

    def rows(self, size: int) -> Tensor:
        """Rows whose values are 0.001 to 10: in the small ones the norm's eps shows."""
        scales = torch.logspace(-3, 1, self.tokens[0], dtype=torch.float64, device=self._device)
        return self(*self.tokens, size) * scales[:, None, None]


def _rms_norm(sizes: Sizes, draw: _Draw) -> Trial:
    def call(kernel: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Mapping[str, Tensor]:
        return {"the norm": kernel(x, weight, eps=EPS, order=sizes.norm_order)}

    inputs = {"x": draw.rows(sizes.hidden_size), "weight": 1 + draw(sizes.hidden_size) / 4}
    return Trial(rms_norm_reference, inputs, call)


def _add_rms_norm(sizes: Sizes, draw: _Draw) -> Trial:
    def call(kernel: Callable[..., Any], x: Tensor, residual: Tensor, weight: Tensor) -> Mapping[str, Tensor]:
        total, normed = kernel(x, residual, weight, eps=EPS, order=sizes.norm_order)
        return {"the sum": total, "its norm": normed}

    x, residual = draw.rows(sizes.hidden_size), draw.rows(sizes.hidden_size)
    weight = 1 + draw(sizes.hidden_size) / 4
    return Trial(add_rms_norm_reference, {"x": x, "residual": residual, "weight": weight}, call)


def _swiglu(sizes: Sizes, draw: _Draw) -> Trial:
    def call(kernel: Callable[..., Tensor], gate_up: Tensor) -> Mapping[str, Tensor]:
        return {"the product": kernel(gate_up)}

    return Trial(swiglu_reference, {"gate_up": 2 * draw(*draw.tokens, 2 * sizes.ffn_size)}, call)


def _tables(x: Tensor, sizes: Sizes, tokens: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The float32 tables of a run, widened for the reference: the kernel is tried, not they."""
    positions_BS = torch.arange(tokens[0] * tokens[1], device=x.device).view(tokens[1], tokens[0])
    tables = rope_tables(positions_BS, head_dim=sizes.head_dim, base=10000.0, dtype=torch.float32)
    cos, sin = (table.to(compute_dtype(x.dtype)) for table in tables)
    return cos, sin


def _rope_qkv(sizes: Sizes, draw: _Draw) -> Trial:
    form = {"interleaved": sizes.interleaved}

    def call(kernel: Callable[..., Any], qkv: Tensor) -> Mapping[str, Tensor]:
        projection = qkv.clone()  # it may be written into
        q, k, v = kernel(projection, *_tables(qkv, sizes, draw.tokens), num_heads=4, num_kv_heads=2, **form)
        return {"q": q, "k": k, "v": v}

    return Trial(rope_qkv_, {"qkv": draw(*draw.tokens, 8 * sizes.head_dim)}, call)


def _attention(sizes: Sizes, draw: _Draw) -> Trial:
    """Of two samples, no longer than shows every kind of block; the reference holds all scores."""
    length = min(sizes.seq_len, 256)
    changes = {}
    if sizes.scores is not None and sizes.scores.alters:
        changes["scores"] = replace(sizes.scores, ranges=None)  # which only say what the kernel is called for
    bounds = sorted({0, 1, length // 3, length, length + length // 2, 2 * length})

    def call(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Mapping[str, Tensor]:
        documents = None
        if sizes.has_documents:
            documents = Documents(tuple(bounds), torch.tensor(bounds, dtype=torch.int32, device=q.device))
        return {"the output": kernel(q, k, v, documents, **changes)}

    heads = {"q": sizes.num_heads, "k": sizes.num_kv_heads, "v": sizes.num_kv_heads}
    inputs = {name: draw(length, 2, count, sizes.head_dim) for name, count in heads.items()}
    inputs["q"] *= 2  # sharper weights: a token too many or too few shows
    return Trial(causal_attention_reference, inputs, call, sums=1024, whole=True)


def _logits(draw: _Draw) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Logits, sharp enough for each to count, their labels, every third on another rank, and how many are no padding.

    Columns of several blocks, and no multiple of one; in some rows the last that is real is the largest, or ties.
    """
    num_real = 8999
    logits = 2 * draw(math.prod(draw.tokens), num_real + 9)
    logits[::2, num_real - 1] = 10
    logits[::4, 5] = 10
    logits[:, num_real:] = 60
    rows = torch.arange(logits.shape[0], device=logits.device)
    is_mine = rows % 3 > 0
    return logits, ((rows * 997 % num_real).where(is_mine, 0), is_mine), num_real


def _softmax_statistics(sizes: Sizes, draw: _Draw) -> Trial:
    """These stay in float32 whatever the logits are in: no rounding to the type of the inputs is allowed."""
    logits, labels, num_real = _logits(draw)

    def call(kernel: Callable[..., Tensor], logits: Tensor) -> Mapping[str, Tensor]:
        found = kernel(logits.detach(), *labels, num_real=num_real, with_top=True)
        names = ("the logarithm of the sum", "the label's logit", "the largest logit", "the count of the largest")
        return dict(zip(names, found, strict=True))

    return Trial(softmax_statistics, {"logits": logits}, call, roundings=0, sums=64)


def _softmax_gradient(sizes: Sizes, draw: _Draw) -> Trial:
    logits, labels, num_real = _logits(draw)

    def call(kernel: Callable[..., None], logits: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        place, wide = logits.detach().clone(), compute_dtype(logits.dtype)
        log_sum, _, top, count = softmax_statistics(place, *labels, num_real=num_real, with_top=True)
        of_rows = (log_sum, weights.detach().to(wide))
        kernel(place, *labels, *of_rows, num_real=num_real, top=(top, top / 8 / count))
        return {"the gradient of logits": place}

    inputs = {"logits": logits, "weights": 1 + draw(logits.shape[0])}
    return Trial(softmax_gradient_, inputs, call, sums=64)


def _adamw(sizes: Sizes, draw: _Draw) -> Trial:
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def call(kernel: Callable[..., None], **tensors: Tensor) -> Mapping[str, Tensor]:
        new = {name: x.detach().clone() for name, x in tensors.items()}
        for factor, applies in ((0.7, True), (math.nan, False)):
            scalars = {"step": torch.tensor(3), "factor": torch.tensor(factor), "applies": torch.tensor(applies)}
            now = settings | {name: x.to(new["param"].device) for name, x in scalars.items()}
            kernel(*new.values(), **now)
            if applies:
                old = {name: x.detach() for name, x in tensors.items()}
                others = _narrow_adamw(kernel, old, new, now) | _published_adamw(kernel, old, now)
        return new | others

    size = 64 * sizes.hidden_size + 3  # no multiple of a block
    inputs = {name: draw(size) for name in ("param", "grad", "exp_avg")}
    return Trial(adamw_, {**inputs, "exp_avg_sq": draw(size).square()}, call, always_wide=True)


def _narrow_adamw(
    kernel: Callable[..., None], tensors: Mapping[str, Tensor], wide: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The same update of a master with a remainder and of moments in bfloat16, from values that these hold exactly.

    The reference in float64 has no such masters; its moments are rounded before. Rounded after, they may be a bfloat16
    apart from those of the ``wide`` update: which are further is told, so that the right answer is zeros.
    """
    param, grad, mean, square = tensors.values()
    rounded = [moment.bfloat16() for moment in (mean, square)]
    if param.dtype is not torch.float32:
        master, moments = param.clone(), [moment.to(param.dtype) for moment in rounded]
        kernel(master, grad, *moments, **settings)
    else:
        weight, remainder = split(param)
        moments = [moment.clone() for moment in rounded]
        kernel(weight, grad, *moments, **settings, remainder=remainder)
        master = join(weight, remainder)
    apart = [
        (new.to(grad.dtype) - wide[name]).abs() > wide[name].abs() / 32 + 0.01
        for name, new in zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
    ]
    return {"the joined master": master, "what is apart": torch.stack(apart).to(grad.dtype)}


def _published_adamw(
    kernel: Callable[..., None], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The same update of a master that is published in bfloat16. What is not the nearest is told as above: by zeros."""
    new = {name: x.clone() for name, x in tensors.items()}
    master = new["param"]
    weight = torch.full_like(master, math.nan, dtype=torch.bfloat16)
    kernel(*new.values(), **settings, publish=weight)
    unit = 2**-8 if master.device.type == "cuda" else 2**-7  # Triton's interpreter cuts off instead of rounding
    is_near = (weight.to(master.dtype) - master).abs() <= master.abs() * unit
    return {"the published master": master, "what is published wrongly": (~is_near).to(master.dtype)}


TRIALS: Mapping[str, Callable[[Sizes, _Draw], Trial]] = MappingProxyType(
    {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rope_qkv": _rope_qkv,
        "swiglu": _swiglu,
        "attention": _attention,
        "softmax_statistics": _softmax_statistics,
        "softmax_gradient": _softmax_gradient,
        "adamw": _adamw,
    }
)


def why_refused(
    op: str, kernel: Callable[..., Any], *, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> str | None:
    """Why ``kernel`` must not run as ``op`` here, in a line: it fails, or errs by more than roundings; else None.

    A value may be off by the trial's roundings to ``dtype`` and to float32 (sums, the GPU's exp) of itself and of
    the root mean square of its row; by more where the trial measures the ``whole``, whose errors together may not.
    """
    try:
        trial = TRIALS[op](sizes, _Draw(device))
        dtype = torch.float32 if trial.always_wide else dtype
        exact, ours = _outcomes(trial, kernel, dtype)
    except Exception as error:  # compilers and drivers raise anything
        return f"it fails: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    allowed = trial.roundings * torch.finfo(dtype).eps + trial.sums * torch.finfo(torch.float32).eps
    for name, value in exact.items():
        if ours[name].shape != value.shape:
            return f"{name} has the shape {tuple(ours[name].shape)}, not {tuple(value.shape)}"
        error_of, square = (ours[name].double() - value).abs(), value.square()
        if trial.whole and not error_of.norm() <= (most := allowed * value.norm()):
            return f"{name} is wrong in all places together, by {error_of.norm() / most:.3g} times what is allowed"
        bound = allowed * (value.abs() + square.mean(-1, keepdim=True).sqrt())
        if trial.whole:
            bound = PEAK * (bound + allowed * square.mean().sqrt())
        wrong = ~(error_of <= bound)  # also what is not a number
        if wrong.any():
            worst = (error_of / bound).nan_to_num(nan=torch.inf).max().item()
            return f"{name} is wrong in {wrong.sum()} of {wrong.numel()} places, by {worst:.3g} times what is allowed"
    return None


def _outcomes(
    trial: Trial, kernel: Callable[..., Any], dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Outputs and gradients by name, of the reference in float64 and of ``kernel`` in ``dtype``.

    Gradients come in that resemble the outputs, else a norm's would hardly have a part along its input.
    """
    rounded = {name: x.to(dtype) for name, x in trial.inputs.items()}
    wide = {name: x.double().requires_grad_() for name, x in rounded.items()}
    narrow = {name: x.requires_grad_() for name, x in rounded.items()}
    with torch.enable_grad():
        exact, ours = trial.call(trial.reference, **wide), trial.call(kernel, **narrow)
    draw = _Draw(next(iter(wide.values())).device)
    grads = {name: (y.detach() + draw(*y.shape)).to(dtype) for name, y in exact.items()}
    return {**exact, **_gradients(exact, wide, grads)}, {**ours, **_gradients(ours, narrow, grads)}


def _gradients(
    outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not all(y.requires_grad for y in outputs.values()):
        return {}
    grad_outputs = [grads[name].to(y.dtype) for name, y in outputs.items()]
    results = torch.autograd.grad([*outputs.values()], [*inputs.values()], grad_outputs)
    return {f"the gradient of {name}": grad for name, grad in zip(inputs, results, strict=True)}
