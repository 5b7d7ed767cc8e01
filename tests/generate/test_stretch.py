"""Longer samples at use than in training: what is the default, what is refused, what is told."""

from dataclasses import replace

import pytest

from megatron_aquila.errors import ConfigError
from megatron_aquila.generate.stretch import beyond_training, stretched
from tests.checkpoint.toy import SHAPE

LONG = 4 * SHAPE.seq_len


def stretch(shape=SHAPE, seq_len=LONG, scaling=None, factor=None, length=None):
    return stretched(shape, seq_len=seq_len, scaling=scaling, factor=factor, length=length)


def test_defaults_lead_from_training_to_the_length_asked_for():
    yarn = stretch(scaling="yarn")
    assert (yarn.seq_len, yarn.rope_factor, yarn.rope_trained_len) == (LONG, 4.0, SHAPE.seq_len)
    assert stretch(scaling="linear").rope_trained_len == 1
    assert stretch(yarn, 2 * LONG, "yarn") == replace(yarn, seq_len=2 * LONG, rope_factor=8.0)
    assert stretch(yarn, None) == yarn


def test_what_is_new_to_the_weights_is_told():
    assert beyond_training(SHAPE, stretch(scaling="ntk")) is None
    assert "count 64 apart" in beyond_training(SHAPE, stretch())
    near = stretch(scaling="two-range", factor=7.0, length=8)  # 8 + 56 / 7
    assert near.longest_reach == SHAPE.seq_len
    assert beyond_training(SHAPE, near) is None
    assert "stretched by two-range 4, have tokens that count 28 apart" in beyond_training(
        SHAPE, stretch(scaling="two-range")
    )


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="--rope-factor"):
        stretch(factor=2.0)
    with pytest.raises(ConfigError, match="--rope-trained-len"):
        stretch(scaling="linear", length=9)
