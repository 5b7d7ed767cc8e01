"""Rotary frequencies for samples longer than those that the weights were trained on.

Every form changes the frequency of each feature pair, once; positions and kernels stay as they are. (The NTK-aware form
is plain frequencies of another base: ``ModelShape.stretched_rope_base``.) With factor f, base b and head width D, the
pair i turns by w_i = b^(-2i/D) radians a position, and its wavelength is 2 pi / w_i tokens:

======  ===================================================================================================
linear  w_i / f: positions are interpolated (Chen et al. 2023, "Extending context window ... by positional
        interpolation"); the 16 K Aquila2 models
yarn    pairs that turn more than 32 times in the trained length stay, those that turn less than once are
        interpolated, a ramp over i between them; and q and k grow by 1 + ln(f)/10 each, as cosines and sines do
        (Peng et al. 2023, YaRN)
llama3  pairs with wavelengths below a quarter of the trained length stay, those above it are interpolated,
        between them a ramp over the inverse wavelength (Llama 3.1's)
======  ===================================================================================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["none", "linear", "yarn", "llama3"]
YARN_TURNS = (32.0, 1.0)  # beta_fast, beta_slow of the paper: turns within the trained length
LLAMA3_PARTS = (1.0, 4.0)  # low_freq_factor, high_freq_factor of Llama 3.1: wavelengths within the trained length


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How positions are stretched: ``factor`` times beyond ``trained_len`` tokens."""

    kind: Kind = "none"
    factor: float = 1.0
    trained_len: int = 1

    def amplitude(self) -> float:
        """What cosines and sines are multiplied with."""
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0


UNSCALED = Scaling()


def rope_frequencies(
    head_dim: int, base: float, scaling: Scaling, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Radians a position that each of the D/2 feature pairs turns by, in ``dtype``. Local."""
    return _FORMS[scaling.kind](_Pairs(head_dim, base, dtype, device), scaling)


@dataclass(frozen=True, slots=True)
class _Pairs:
    head_dim: int
    base: float
    dtype: torch.dtype
    device: torch.device

    def plain(self) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=self.dtype, device=self.device) / self.head_dim
        return 1.0 / self.base**exponents

    def turning(self, turns: float, length: int) -> float:
        """The number, a fraction, of the pair that turns ``turns`` times within ``length`` tokens."""
        return self.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def _linear(pairs: _Pairs, scaling: Scaling) -> Tensor:
    return pairs.plain() / scaling.factor


def _yarn(pairs: _Pairs, scaling: Scaling) -> Tensor:
    fast, slow = (pairs.turning(turns, scaling.trained_len) for turns in YARN_TURNS)
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), pairs.head_dim - 1)
    steps = torch.arange(pairs.head_dim // 2, dtype=pairs.dtype, device=pairs.device) - first
    # A ramp of no length is a step; a thousandth of a pair keeps the division defined.
    interpolated = (steps / (last - first if last != first else 0.001)).clamp(0, 1)
    plain = pairs.plain()
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _llama3(pairs: _Pairs, scaling: Scaling) -> Tensor:
    low, high = LLAMA3_PARTS
    plain = pairs.plain()
    fitting = scaling.trained_len * plain / (2 * math.pi)  # wavelengths within the trained length
    kept = ((fitting - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


_FORMS: dict[Kind, Callable[[_Pairs, Scaling], Tensor]] = {
    "none": lambda pairs, _scaling: pairs.plain(),
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}
