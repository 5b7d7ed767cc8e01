import json

import pytest

from megatron_aquila.errors import CheckpointError
from megatron_aquila.optim.scaler import LossScale
from megatron_aquila.train.state import TrainState


def test_a_step_consumes_its_samples_and_a_skipped_one_does_not_count_for_adam() -> None:
    start = TrainState(seed=1, index_segments=(100,))
    first = start.moved_on(samples=8, tokens=80)
    second = first.moved_on(samples=8, tokens=80)
    assert (second.step, second.consumed_samples, second.applied_steps, second.skipped_samples) == (2, 16, 0, ())
    first = first.settled((0, 8), applied=True, loss_scale=LossScale())
    state = second.settled((0, 8), applied=True, loss_scale=LossScale())
    state = state.settled((8, 16), applied=False, loss_scale=LossScale(8.0))
    at_once = first.moved_on(samples=8, tokens=80).settled((8, 16), applied=False, loss_scale=LossScale(8.0))
    assert state == at_once, "when a step is settled changes nothing"
    assert (state.step, state.applied_steps, state.consumed_samples, state.consumed_tokens) == (2, 1, 16, 160)
    assert state.skipped_samples == ((8, 16),)
    assert state.loss_scale == LossScale(8.0)


def test_where_the_batch_becomes_another_is_kept() -> None:
    state = TrainState(seed=1, index_segments=(100,))
    for samples in (2, 2, 4, 4, 4, 2):
        state = state.moved_on(samples=samples, tokens=1)
    assert state.batches == ((0, 0, 2), (2, 4, 4), (5, 16, 2))


def test_json_round_trip_is_exact() -> None:
    state = TrainState(
        seed=1, index_segments=(100, 20), skipped_samples=((8, 16),), step=3, loss_scale=LossScale(0.1, 7, -1)
    ).moved_on(samples=4, tokens=9)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_checkpoint_older_than_some_fields_still_loads() -> None:
    state = TrainState(seed=1, index_segments=(100,), step=3)
    values = state.to_json()
    for name in ("loss_scale", "recent", "run", "parent", "parent_digest", "taken", "upcoming", "batches"):
        del values[name]
    assert TrainState.from_json(values) == state


def test_extending_appends_a_segment_and_never_changes_the_old_ones() -> None:
    state = TrainState(seed=1, index_segments=(100,))
    assert state.extended_to(90).index_segments == (100,)
    assert state.extended_to(130).index_segments == (100, 30)
    assert state.extended_to(130).extended_to(150).index_segments == (100, 30, 20)


def test_a_foreign_state_is_refused_with_its_fields() -> None:
    with pytest.raises(CheckpointError, match="iteration"):
        TrainState.from_json({"iteration": 3})
