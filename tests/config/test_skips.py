import pytest

from megatron_aquila.config.schema import TrainConfig
from megatron_aquila.config.skips import left_out
from tests.config.test_inputs import flaws


def test_ranges_include_both_ends() -> None:
    assert left_out(TrainConfig(skip_samples=("3-3", "10-19"))) == ((3, 4), (10, 20))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--skip-samples 3", "--skip-samples 3: is no range FIRST-LAST; use e.g. 4096-5119, or 17-17 for one sample"),
        ("--skip-samples 1-2 9-4", "--skip-samples 9-4: its last sample is before its first; use 4-9"),
        (
            "--train-samples 100 --skip-samples 100-120",
            "--skip-samples 100-120: the run has 100 samples, the first is 0; leave it out, or raise --train-samples",
        ),
        (
            "--on-nonfinite rewind",
            "--on-nonfinite rewind: there are no checkpoints to go back to; give --save FOLDER, or use skip",
        ),
        (
            "--on-spike rewind",
            "--on-spike rewind: there are no checkpoints to go back to; give --save FOLDER, or use skip",
        ),
        (
            "--on-spike skip --spike-window 0",
            "--on-spike skip: with --spike-window 0 nothing is a spike; use --spike-window 128, or leave it out",
        ),
        (
            "--spike-window 3",
            "--spike-window 3: so few steps have no median worth the name; use 8 or more, or 0 for no test",
        ),
        ("--load auto", "--load auto: it continues from the --save folder, and none is given; give --save FOLDER"),
        (
            "--load auto --save a --no-load-optim",
            "--no-load-optim: it starts a new run from the weights that --load names, and none are named; give --load "
            "FOLDER with it, or leave it out",
        ),
    ],
)
def test_what_is_wrong_is_said_with_a_way_out(text: str, words: str) -> None:
    assert flaws(text) == [words]


@pytest.mark.parametrize(
    "text",
    [
        "--save a --load auto",
        "--save a --load auto --init-from-hf b --override-data",
        "--save a --on-nonfinite rewind --on-spike rewind",
        "--skip-samples 0-9 20-20 --spike-window 0",
    ],
)
def test_sound_settings(text: str) -> None:
    assert flaws(text) == []
