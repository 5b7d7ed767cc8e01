"""The loss scale's laws, and Megatron-LM's ``DynamicGradScaler`` as a second opinion."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.optim.scaler import LossScale, LossScaling

PUBLISHED = LossScaling(initial=522893.0, minimum=1.0, window=1000, hysteresis=2)


@dataclass
class DynamicGradScaler:
    """Megatron-LM's, in its own words and order: megatron/core/optimizer/grad_scaler.py."""

    rule: LossScaling
    scale: float = field(init=False)
    growth_tracker: int = 0
    hysteresis_tracker: int = field(init=False)

    def __post_init__(self) -> None:
        self.scale, self.hysteresis_tracker = self.rule.initial, self.rule.hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale * 0.5, self.rule.minimum)
        else:
            self.growth_tracker += 1
            if self.growth_tracker == self.rule.window:
                self.growth_tracker = 0
                self.hysteresis_tracker = self.rule.hysteresis
                self.scale = self.scale * 2.0


rules = st.builds(
    LossScaling,
    initial=st.floats(1, 2**32),
    minimum=st.floats(0.25, 1),
    window=st.integers(1, 5),
    hysteresis=st.integers(1, 4),
)


def states(rule: LossScaling, overflows: list[bool]) -> list[LossScale]:
    found = [rule.start()]
    for found_inf in overflows:
        found.append(rule.after(found[-1], found_inf=found_inf))
    return found


@given(rules, st.lists(st.booleans(), max_size=60))
def test_it_moves_as_megatrons_does(rule: LossScaling, overflows: list[bool]) -> None:
    theirs = DynamicGradScaler(rule)
    for found_inf, ours in zip(overflows, states(rule, overflows)[1:], strict=True):
        theirs.update(found_inf)
        assert ours == LossScale(theirs.scale, theirs.growth_tracker, theirs.hysteresis_tracker)


@given(rules, st.lists(st.booleans(), max_size=60))
def test_it_never_falls_below_the_minimum_and_moves_by_two(rule: LossScaling, overflows: list[bool]) -> None:
    found = states(rule, overflows)
    for found_inf, before, after in zip(overflows, found, found[1:], strict=False):
        assert after.scale >= rule.minimum
        assert 0 <= after.good_steps < (rule.window or 0)
        allowed = {before.scale, max(before.scale / 2, rule.minimum)} if found_inf else {before.scale, before.scale * 2}
        assert after.scale in allowed
        assert not (found_inf and rule.is_lowest(before)) or after.scale == before.scale


def test_the_published_scale_grows_after_a_thousand_good_steps_and_halves_at_the_second_overflow() -> None:
    good = states(PUBLISHED, [False] * 1000)
    assert [state.scale for state in good[-2:]] == [522893.0, 1045786.0]
    assert good[-1] == LossScale(1045786.0, 0, 2)
    bad = states(PUBLISHED, [True, False, True, True])
    assert [state.scale for state in bad] == [522893.0, 522893.0, 522893.0, 261446.5, 130723.25]


@pytest.mark.parametrize("found_inf", [False, True])
def test_a_constant_scale_never_moves_and_replaces_a_saved_one(found_inf: bool) -> None:
    rule = LossScaling.constant(512.0)
    assert rule.after(rule.start(), found_inf=found_inf) == rule.start() == rule.resumed(LossScale(64.0))
    assert rule.is_lowest(rule.start())
    assert PUBLISHED.resumed(LossScale(64.0)) == LossScale(64.0)
