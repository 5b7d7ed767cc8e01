"""What is a spike: a loss or a gradient norm far above what the last steps had, by a test that a spike cannot move."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_aquila.config.schema import TrainConfig
from megatron_aquila.train.state import Figures, TrainState

SIGMA = 1.4826  # of a normal distribution, by its median absolute deviation
LEAST_SPREAD = 1e-3  # of the median: figures that hardly vary would make a spike of every rounding
LAG = 2  # a step is judged by those before the one before it, which a GPU may still be at work on


@dataclass(frozen=True, slots=True)
class Limits:
    """Above these a step is a spike. Infinite while too few steps are known."""

    loss: float = math.inf
    grad_norm: float = math.inf


def limits(train: TrainConfig, state: TrainState) -> Limits:
    """For the step after ``state``. A function of settled figures, which are every rank's, so all ranks have the same.

    It is known before the step is launched, and whatever the device, from the same steps: a resumed run judges as the
    one that was never stopped.
    """
    known = [figures for figures in state.recent if figures.step <= state.step + 1 - LAG][-train.spike_window :]
    if train.spike_window == 0 or len(known) < train.spike_window:
        return Limits()
    return Limits(
        loss=limit([figures.loss for figures in known], train.spike_threshold),
        grad_norm=limit([figures.grad_norm for figures in known], train.spike_threshold),
    )


def limit(values: Sequence[float], threshold: float) -> float:
    """The median and ``threshold`` robust standard deviations."""
    middle = median(values)
    spread = SIGMA * median(abs(value - middle) for value in values)
    return middle + threshold * max(spread, LEAST_SPREAD * abs(middle))


def remembered(train: TrainConfig) -> int:
    """Steps whose figures are kept for ``limits``."""
    return train.spike_window + LAG - 1 if train.spike_window > 0 else 0


def finite(step: int, loss: float, grad_norm: float) -> Figures | None:
    """A step's figures, where both are numbers."""
    return Figures(step, loss, grad_norm) if math.isfinite(loss) and math.isfinite(grad_norm) else None
