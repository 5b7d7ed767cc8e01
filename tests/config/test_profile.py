"""The steps to profile, and Megatron-LM's way of naming them."""

import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.observe import ObserveConfig
from megatron_aquila.config.profile import profiled_steps
from megatron_aquila.errors import ConfigError


def test_both_ends_are_included() -> None:
    assert list(profiled_steps(ObserveConfig(profile_steps="11-13"))) == [11, 12, 13]
    assert list(profiled_steps(ObserveConfig())) == []


def test_megatron_s_flags_are_answered_with_ours() -> None:
    argv = "--profile --profile-step-start 10 --profile-step-end 12 --profile-ranks 0 --use-pytorch-profiler"
    with pytest.raises(ConfigError) as caught:
        load_config(argv.split())
    ways = {problem.flag: problem.way_out for problem in caught.value.problems}
    assert ways == {
        "--profile": "use --profile-steps FIRST-LAST",
        "--profile-step-start": "use --profile-steps 11-LAST",
        "--profile-step-end": "use --profile-steps FIRST-12",
    }
