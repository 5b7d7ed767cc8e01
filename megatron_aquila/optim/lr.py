"""The learning rate as a function of the samples consumed, by Megatron-LM's formulas."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Anneal = Callable[[float], float]

# From 1 at the begin of the decay to 0 at its end; the argument is the share of the decay that has passed.
ANNEALS: Mapping[str, Anneal] = {
    "linear": lambda passed: 1.0 - passed,
    "cosine": lambda passed: 0.5 * (math.cos(math.pi * passed) + 1.0),
    "exponential": lambda passed: 2.0 * math.pow(0.5, passed) - 1.0,
    "minus_sqrt": lambda passed: 1.0 - math.sqrt(passed),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSchedule:
    """Linear warm-up from 0 to ``peak``, then ``decay`` to ``minimum``. All lengths are in samples.

    ``decay_samples`` counts from the start of the run, warm-up included; behind it the rate is ``minimum``. "wsd" stays
    at ``peak`` until the last ``wsd_decay_samples`` of it and then falls as ``wsd_decay`` says. "constant" never falls.
    """

    peak: float
    minimum: float
    warmup_samples: int
    decay_samples: int
    decay: Literal["cosine", "linear", "constant", "wsd"]
    wsd_decay_samples: int | None = None
    wsd_decay: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"

    def __post_init__(self) -> None:
        assert 0 <= self.minimum <= self.peak, f"0 <= minimum {self.minimum} <= peak {self.peak} does not hold"
        assert 0 <= self.warmup_samples < self.decay_samples, (
            f"warm-up of {self.warmup_samples} samples does not end before the decay's {self.decay_samples}"
        )
        if self.decay == "wsd":
            room = self.decay_samples - self.warmup_samples
            assert self.wsd_decay_samples is not None, "wsd needs the length of its final decay"
            assert 0 < self.wsd_decay_samples <= room, (
                f"a final decay of {self.wsd_decay_samples} samples does not fit into {room} after the warm-up"
            )

    def at(self, consumed_samples: int) -> float:
        """The rate of the step that begins after ``consumed_samples``."""
        if self.warmup_samples > 0 and consumed_samples <= self.warmup_samples:
            return self.peak * consumed_samples / self.warmup_samples
        if self.decay == "constant":
            return self.peak
        if consumed_samples > self.decay_samples:
            return self.minimum
        begin, shape = self.warmup_samples, str(self.decay)
        if self.decay == "wsd":
            assert self.wsd_decay_samples is not None, "checked when built"
            begin, shape = self.decay_samples - self.wsd_decay_samples, self.wsd_decay
        passed = max(0, consumed_samples - begin) / (self.decay_samples - begin)
        return self.minimum + ANNEALS[shape](passed) * (self.peak - self.minimum)
