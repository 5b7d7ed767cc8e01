"""Learning rates against values worked out by hand from Megatron-LM's formulas, and their laws."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.optim.lr import ANNEALS, LrSchedule

PEAK, MINIMUM = 3e-4, 3e-5
DELTA = PEAK - MINIMUM


def schedule(decay: Any, wsd_decay: Any = "linear", **changes: Any) -> LrSchedule:
    lengths = {"warmup_samples": 100, "decay_samples": 1100, "wsd_decay_samples": 400} | changes
    return LrSchedule(peak=PEAK, minimum=MINIMUM, decay=decay, wsd_decay=wsd_decay, **lengths)


ALL = [schedule(decay) for decay in ("cosine", "linear", "constant")] + [schedule("wsd", shape) for shape in ANNEALS]


@pytest.mark.parametrize(
    ("lr", "at", "expected"),
    [
        (schedule("cosine"), 0, 0.0),
        (schedule("cosine"), 50, PEAK / 2),
        (schedule("cosine"), 100, PEAK),
        (schedule("cosine"), 350, MINIMUM + DELTA * (1 + math.sqrt(0.5)) / 2),
        (schedule("cosine"), 600, MINIMUM + DELTA / 2),
        (schedule("cosine"), 1100, MINIMUM),
        (schedule("cosine"), 5000, MINIMUM),
        (schedule("linear"), 850, MINIMUM + DELTA / 4),
        (schedule("linear"), 1099, MINIMUM + DELTA / 1000),
        (schedule("constant"), 5000, PEAK),
        (schedule("wsd"), 700, PEAK),
        (schedule("wsd"), 900, MINIMUM + DELTA / 2),
        (schedule("wsd", "cosine"), 800, MINIMUM + DELTA * (1 + math.sqrt(0.5)) / 2),
        (schedule("wsd", "exponential"), 900, MINIMUM + DELTA * (math.sqrt(2) - 1)),
        (schedule("wsd", "minus_sqrt"), 800, MINIMUM + DELTA / 2),
        (schedule("wsd", "minus_sqrt"), 1100, MINIMUM),
        (schedule("cosine", warmup_samples=0), 0, PEAK),
    ],
)
def test_values(lr: LrSchedule, at: int, expected: float) -> None:
    assert lr.at(at) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("lr", ALL)
@given(at=st.integers(0, 3000))
def test_bounds_and_direction(lr: LrSchedule, at: int) -> None:
    now, then = lr.at(at), lr.at(at + 1)
    assert 0 <= now <= PEAK * (1 + 1e-12)
    if at < lr.warmup_samples:
        assert then > now
    else:
        assert MINIMUM * (1 - 1e-12) <= then <= now * (1 + 1e-12)


@pytest.mark.parametrize("lr", ALL)
@given(at=st.integers(0, 3000))
def test_continuity(lr: LrSchedule, at: int) -> None:
    """No jump at a border of phases. The steepest slope is minus_sqrt's first sample: sqrt(1 / 400) of the fall."""
    assert abs(lr.at(at + 1) - lr.at(at)) <= PEAK * math.sqrt(1 / 400)


@pytest.mark.parametrize("shape", ANNEALS)
def test_anneals_go_from_one_to_zero(shape: str) -> None:
    assert ANNEALS[shape](0.0) == 1.0
    assert ANNEALS[shape](1.0) == 0.0


@pytest.mark.parametrize(
    ("decay", "changes", "message"),
    [
        ("cosine", {"warmup_samples": 1100}, "does not end before"),
        ("wsd", {"wsd_decay_samples": None}, "needs the length"),
        ("wsd", {"wsd_decay_samples": 1001}, "does not fit into 1000"),
    ],
)
def test_impossible_lengths_are_our_mistake(decay: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        schedule(decay, **changes)


def test_a_minimum_above_the_peak_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="does not hold"):
        LrSchedule(peak=1e-4, minimum=1e-3, warmup_samples=0, decay_samples=1, decay="linear")
