"""Checkpoints on the nodes' own disks: a run goes on from them bit for bit, or says why not and goes further back."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.train import trainer
from megatron_aquila.train.ephemeral import rank_folder
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import Recorder, run, split, tiny_config
from tests.train.test_resume import figures, resumed, tensors

Pools = Callable[[int], WorkerPool]


class Killed(BaseException):
    """As SIGKILL: nothing of the run runs after it."""


def on_nodes(config: RunConfig, folder: Path) -> RunConfig:
    """Durable at step 3 and the end, ephemeral after each other one; each rank has a disk of its own."""
    disks = folder / "disk_of_$RANK"
    return resumed(config, save_interval=3, ephemeral_save_interval=1, ephemeral_save_dir=str(disks), resume=True)


def disk(config: RunConfig, rank: int) -> Path:
    """Where a rank has its parts."""
    assert config.checkpoint.ephemeral_save_dir is not None
    named = config.checkpoint.ephemeral_save_dir.replace("$RANK", str(rank))
    return rank_folder(replace(config.checkpoint, ephemeral_save_dir=named), rank)


def killed(config: RunConfig, at: int, recorder: Recorder | None = None) -> Recorder:
    """The run until before the step after ``at``, when all that was begun is written and published."""
    recorder = Recorder() if recorder is None else recorder
    original = trainer.train_step

    def dies(machine: Any, corpus: Any, state: Any, **how: Any) -> Any:
        if state.step == at:
            raise Killed
        return original(machine, corpus, state, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", os.environ.get("RANK", "0"))
        patch.setattr(trainer, "train_step", dies)
        patch.setattr(trainer.Saver, "poll", trainer.Saver.finish)
        patch.setattr(trainer.Loop, "_after_step", after_step_and_wait(trainer.Loop._after_step))
        with pytest.raises(Killed):
            run(config, recorder=recorder)
    return recorder


def after_step_and_wait(original: Callable[..., None]) -> Callable[..., None]:
    """The end of a step with all that it began to save."""

    def ends(loop: trainer.Loop, *, last: bool) -> None:
        original(loop, last=last)
        loop._saver.finish()

    return ends


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"zero": 3}])
@pytest.mark.parametrize("precision", ["bf16"])
def test_a_killed_run_goes_on_from_the_parts_of_all_ranks_bit_for_bit(
    precision: str, layout: Mapping[str, Any], pool: Pools, tmp_path: Path
) -> None:
    config = split(tiny_config(tmp_path, precision=precision), **layout)
    never = pool(2).run(run, resumed(config, save=tmp_path / "never"))[0]
    config = on_nodes(config, tmp_path)
    first = pool(2).run(killed, config, 5)[0]
    assert [path.name for path in sorted(disk(config, 1).iterdir())] == ["latest", "step_0000005"]
    assert not list(disk(config, 0).parents[1].glob("*/rank_00001")), "another's disk"
    rest = pool(2).run(run, config)[0]
    assert figures(first) + figures(rest) == figures(never)
    assert config.checkpoint.save is not None
    expected, found = tensors(tmp_path / "never"), tensors(config.checkpoint.save)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(disk(config, 0).glob("step_*")) == [], "a newer durable one is there"
