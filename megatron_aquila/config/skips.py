"""Which samples of a run are left out, when a step is a spike, and what is wrong with the settings that say so."""

import re
from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig, TrainConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.errors import Problem


def left_out(train: TrainConfig) -> tuple[tuple[int, int], ...]:
    """The half-open ranges that ``--skip-samples`` names."""
    bounds = (word.split("-") for word in train.skip_samples)
    return tuple((int(first), int(last) + 1) for first, last in bounds)


def check_skips(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Each range is one, within the run."""
    flag, total = "--skip-samples", config.train.train_samples
    for word in config.train.skip_samples:
        if re.fullmatch(r"\d+-\d+", word) is None:
            yield Problem(flag, word, "is no range FIRST-LAST", "use e.g. 4096-5119, or 17-17 for one sample")
            continue
        first, last = (int(bound) for bound in word.split("-"))
        if last < first:
            yield Problem(flag, word, "its last sample is before its first", f"use {last}-{first}")
        elif first >= total:
            why = f"the run has {total} samples, the first is 0"
            yield Problem(flag, word, why, "leave it out, or raise --train-samples")


def check_faults(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """What goes back needs a place to go back to, and what acts on spikes needs to know them."""
    train = config.train
    if config.checkpoint.save is None:
        for flag, policy in (("--on-nonfinite", train.on_nonfinite), ("--on-spike", train.on_spike)):
            if policy == "rewind":
                yield Problem(flag, policy, "there are no checkpoints to go back to", "give --save FOLDER, or use skip")
    if train.spike_window == 0 and train.on_spike != "warn":
        why = "with --spike-window 0 nothing is a spike"
        yield Problem("--on-spike", train.on_spike, why, "use --spike-window 128, or leave it out")
    if 0 < train.spike_window < 8:
        why = "so few steps have no median worth the name"
        yield Problem("--spike-window", spell(train.spike_window), why, "use 8 or more, or 0 for no test")
