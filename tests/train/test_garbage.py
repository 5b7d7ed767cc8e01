"""Python's garbage: when it is collected, and that no step leaves any that holds a tensor."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.train import trainer
from megatron_aquila.train.garbage import Garbage
from tests.train.runs import Recorder, run, split, tiny_config


@contextmanager
def collections(now: Callable[[], int]) -> Iterator[list[int]]:
    """What ``now`` is at each collection in the body."""
    seen: list[int] = []

    def note(phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(now())

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


def make_garbage(count: int) -> None:
    """Cycles, more than Python lets be before it collects."""
    for _ in range(count):
        cycle: list[Any] = []
        cycle.append(cycle)


def test_garbage_is_collected_after_every_so_many_steps_and_else_never() -> None:
    step, garbage = 0, Garbage(interval=3)
    was_frozen = gc.get_freeze_count()
    with collections(lambda: step) as seen:
        garbage.begin()
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        for step in range(1, 8):
            make_garbage(3000)
            garbage.after(step)
        garbage.close()
    assert seen == [0, 3, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() == was_frozen


def test_an_interval_of_none_leaves_it_to_python() -> None:
    garbage = Garbage(interval=0)
    garbage.begin()
    assert gc.isenabled()
    with mock.patch.object(gc, "collect") as collect:
        garbage.after(50)
    assert not collect.called
    garbage.close()
    assert gc.isenabled()


def test_what_others_froze_or_switched_off_stays_so() -> None:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        frozen, garbage = gc.get_freeze_count(), Garbage(interval=1)
        garbage.begin()
        garbage.close()
        assert gc.get_freeze_count() > 0.9 * frozen, "what nobody needs any more goes"
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()


def watched_run(config: RunConfig, intervals: tuple[int, ...]) -> list[tuple[list[int], list[float], bool]]:
    """Of a run at each interval: after which steps was collected, the losses, whether Python collects again."""
    found = []
    for interval in intervals:
        told = Recorder()
        with collections(lambda told=told: len(told.reports)) as seen:
            run(replace(config, train=replace(config.train, gc_interval=interval)), recorder=told)
        found.append((seen, [report.loss for report in told.reports], gc.isenabled()))
    return found


def test_all_ranks_collect_after_the_same_steps_and_no_loss_depends_on_it(pool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=32)
    config = replace(split(config), checkpoint=replace(config.checkpoint, save=None))
    for own in pool(2).run(watched_run, config, (1, 2, 0)):
        (each, losses, _), (second, same, _), (_, pythons, _) = own
        assert [step for step in each if step > 0] == [1, 2, 3, 4]
        assert [step for step in second if step > 0] == [2, 4]
        assert losses == same == pythons
        assert all(is_enabled for _, _, is_enabled in own)


def left_by_steps(config: RunConfig, leak: bool) -> list[tuple[int, int]]:
    """After each step: how many objects wait to be collected, and how many tensors are among them."""
    found: list[tuple[int, int]] = []

    def look(_garbage: Garbage, _step: int) -> None:
        gc.collect()
        found.append((len(gc.garbage), sum(isinstance(kept, torch.Tensor) for kept in gc.garbage)))
        for kept in gc.garbage:  # taken apart, or the next look would find them again
            if isinstance(kept, list | dict):
                kept.clear()
        gc.garbage.clear()

    def step(*args: Any, **settings: Any) -> Any:
        gc.set_debug(gc.DEBUG_SAVEALL)
        if leak:
            cycle: list[Any] = [torch.zeros(3)]
            cycle.append(cycle)
        return taken(*args, **settings)

    taken = trainer.train_step
    try:
        with mock.patch.object(Garbage, "after", look), mock.patch.object(trainer, "train_step", step):
            run(config)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    return found


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (1, {"recompute": "full", "offload_activations": 1}),
        (2, {"zero": 3}),
        (2, {"pp": 2, "schedule": "zb-h1"}),
        (2, {"tp": 2, "sequence": True}),
        (2, {"context": 2}),
    ],
    ids=str,
)
def test_no_tensor_waits_for_a_collection(pool, tmp_path: Path, world: int, layout: dict[str, Any]) -> None:
    """Of three steps, one with a validation and one with a checkpoint; the first builds what stays."""
    train = layout if world == 1 else {}
    config = tiny_config(tmp_path, train_samples=24, eval_interval=2, **train)
    config = config if world == 1 else split(config, **layout)
    for own in pool(world).run(left_by_steps, config, False):
        assert [tensors for _, tensors in own] == [0, 0, 0]
        assert all(count < 200 for count, _ in own[1:]), own


def test_a_tensor_in_a_cycle_would_be_found(pool, tmp_path: Path) -> None:
    ((*_, last),) = pool(1).run(left_by_steps, tiny_config(tmp_path, train_samples=16), True)
    assert last[1] == 1
