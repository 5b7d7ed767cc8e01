"""Which steps of a run are profiled, and what is wrong with the settings that say so."""

import re
from collections.abc import Iterator

from megatron_aquila.config.derive import batch_plan
from megatron_aquila.config.observe import ObserveConfig
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import spell
from megatron_aquila.errors import Problem


def profiled_steps(observe: ObserveConfig) -> range:
    """The steps that ``--profile-steps`` names, the first step of a run being 1; empty where it is not given."""
    if observe.profile_steps is None:
        return range(0)
    first, last = (int(word) for word in observe.profile_steps.split("-"))
    return range(first, last + 1)


def check_profile(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """The steps are a range within the run, the ranks within the world, and there is a folder for the trace."""
    observe, flag = config.observe, "--profile-steps"
    given = observe.profile_steps
    if given is None:
        return
    if re.fullmatch(r"\d+-\d+", given) is None:
        yield Problem(flag, given, "is no range FIRST-LAST", "use e.g. 11-12")
        return
    steps = profiled_steps(observe)
    num_steps = batch_plan(config, 1).num_steps(config.train.train_samples)
    if len(steps) == 0 or steps[0] < 1:
        yield Problem(flag, given, "no step is in this range, and the first step is 1", "use e.g. 11-12")
    elif steps[-1] > num_steps:
        nearest = f"{max(1, num_steps - len(steps) + 1)}-{num_steps}"
        yield Problem(flag, given, f"the run has {num_steps} steps", f"use {nearest}")
    if observe.log_dir is None and config.checkpoint.save is None:
        yield Problem(flag, given, "there is no folder for the trace", "give --log-dir or --save")
    absent = [] if world is None else [rank for rank in observe.profile_ranks if rank >= world]
    if absent:
        why = f"the world has {world} {'rank' if world == 1 else 'ranks'}, the first is 0"
        yield Problem("--profile-ranks", spell(observe.profile_ranks), why, f"leave out {spell(absent)}")
