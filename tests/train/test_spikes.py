import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.config.schema import TrainConfig
from megatron_aquila.optim.clip import Clip
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.spikes import LAG, Limits, finite, limit, limits, remembered
from megatron_aquila.train.state import Figures, TrainState
from megatron_aquila.train.step import judge

WINDOW = TrainConfig(spike_window=8, spike_threshold=5.0)


def after(*losses: float) -> TrainState:
    """The state after steps with these losses."""
    state = TrainState(seed=1, index_segments=(1000,))
    for step, loss in enumerate(losses, start=1):
        state = state.moved_on(samples=1, tokens=1).remembering(
            Figures(step, loss, 2 * loss), window=remembered(WINDOW)
        )
    return state


def test_nothing_is_a_spike_before_the_window_is_full_and_the_last_step_is_not_in_it() -> None:
    figures = [4.0, 4.1, 3.9, 4.0, 4.2, 3.8, 4.0, 4.1]
    assert limits(WINDOW, after(*figures)) == Limits()
    full = limits(WINDOW, after(*figures, 100.0))
    assert full.loss == pytest.approx(4.0 + 5 * 1.4826 * 0.1, abs=0.1)
    assert full.grad_norm == pytest.approx(2 * full.loss)
    assert full == limits(WINDOW, after(*figures, 1.0)), "a GPU may still be at work on the last step"


def test_it_is_the_same_whether_the_last_step_is_settled_or_not() -> None:
    settled = after(*[4.0 + 0.01 * number for number in range(9)])
    ahead = replace(settled, recent=settled.recent[:-1])
    assert limits(WINDOW, settled) == limits(WINDOW, ahead)
    assert len(after(*range(100)).recent) == WINDOW.spike_window + LAG - 1, "what a resumed run needs is kept, no more"


@given(st.lists(st.floats(0.1, 100), min_size=9, max_size=30), st.floats(1, 20))
def test_half_of_the_window_cannot_move_it_beyond_the_other_half(values: list[float], threshold: float) -> None:
    spiked = values + [1e9] * (len(values) - 1)
    assert limit(spiked, threshold) <= max(values) + threshold * max(1.4826 * (max(values) - min(values)), 1e-3 * 100)


def test_figures_that_hardly_vary_make_no_spike_of_a_rounding() -> None:
    assert limit([4.0] * 8, 10.0) == pytest.approx(4.04)


def test_no_window_no_spike() -> None:
    off = TrainConfig(spike_window=0)
    assert limits(off, after(*range(20))) == Limits()
    assert remembered(off) == 0
    assert after(1.0).remembering(Figures(2, 1.0, 1.0), window=0).recent == ()


def test_what_is_no_number_is_not_remembered() -> None:
    assert finite(1, math.nan, 1.0) is finite(1, 1.0, math.inf) is None
    assert finite(1, 2.0, 3.0) == Figures(1, 2.0, 3.0)


@pytest.mark.parametrize(
    ("loss", "norm", "refuses", "expected"),
    [
        (4.0, 1.0, True, (1, 0, 1)),
        (4.0, 3.0, True, (1, 1, 0)),
        (6.0, 1.0, True, (1, 1, 0)),
        (6.0, 3.0, False, (1, 1, 1)),
        (math.nan, 1.0, False, (0, 0, 0)),
        (math.inf, 1.0, True, (0, 1, 0)),
        (4.0, math.nan, True, (0, 0, 0)),
    ],
)
def test_a_step_is_judged_on_the_device(
    loss: float, norm: float, refuses: bool, expected: tuple[int, int, int]
) -> None:
    sums = LossSums(["a", "b"], num_tokens=10, device=torch.device("cpu"))
    total = torch.tensor([4 * loss, 6 * loss, 4.0, 6.0], dtype=torch.float64)
    clip = Clip.at(torch.tensor(norm, dtype=torch.float64), 1.0)
    judged = judge(clip, sums, total, Limits(5.0, 2.0), refuses_spikes=refuses)
    assert tuple(judged.figures[-3:].int().tolist()) == expected
    assert bool(judged.clip.applies) == bool(expected[2])
    assert torch.equal(judged.figures[:4].nan_to_num(), total.nan_to_num())
