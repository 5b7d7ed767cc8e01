import pytest

from megatron_aquila.observe.timers import Timers


def test_seconds_add_up_by_name_until_taken():
    ticks = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    timers = Timers(clock=lambda: next(ticks))
    for name in ("data", "step", "data"):
        with timers.measure(name):
            pass
    assert timers.take() == {"data": 1.25, "step": 2.5}
    assert timers.take() == {}


def test_a_block_that_raises_is_timed_too():
    ticks = iter([0.0, 3.0])
    timers = Timers(clock=lambda: next(ticks))
    with pytest.raises(ValueError, match="stop"), timers.measure("step"):
        raise ValueError("stop")
    assert timers.take() == {"step": 3.0}
