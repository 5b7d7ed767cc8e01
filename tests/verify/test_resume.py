"""The proof of a resume holds where it should, and finds what a resume can lose."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.commands import selftest
from megatron_aquila.config.schema import RunConfig, TrainConfig
from megatron_aquila.errors import ConfigError
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.train.run import Prepared
from megatron_aquila.train.state import TrainState
from megatron_aquila.verify import resume
from megatron_aquila.verify.resume import Leg, compare_checkpoints, compare_legs, prove_resume, run_leg, small_run


def lost_moment(run: Prepared) -> TrainState:
    for kind, _, values in run.machine.optimizer.ranges():
        if kind == "exp_avg_sq":
            values.zero_()
    return run.start.state


def shifted_sample(run: Prepared) -> TrainState:
    fetch = run.corpus.train.fetch

    def shifted(consumed_samples: int, global_batch: int) -> list[Batch]:
        return fetch(consumed_samples - 1, global_batch)

    run.corpus.train.fetch = shifted  # type: ignore[method-assign]  # of this one loader
    return run.start.state


def wrong_random(run: Prepared) -> TrainState:
    torch.rand(1)
    return run.start.state


def lost_count(run: Prepared) -> TrainState:
    run.machine.optimizer.applied_steps = 0
    return run.start.state


def test_the_command_proves_a_pipeline_in_bf16_with_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "resume --pp 2 --dp 1 --num-layers 8 --hidden-size 64 --num-heads 4 --global-batch 8 --precision bf16"
    assert selftest.main([*argv.split(), "--steps", "1", "--on-spike", "skip", "--master-weights", "remainder"]) == 0
    out = capsys.readouterr().out
    assert "pp 2 overlap" in out
    assert out.splitlines()[-1] == "every bit is equal"
    assert out.count("  equal\n") == 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Leg]:
    """A small run on one process, stopped half-way in another folder, and what a process saw of the whole of it."""
    config = small_run(RunConfig(train=TrainConfig(precision="fp32")), tmp_path_factory.mktemp("resume"), steps=2)
    leg = run_leg(config)
    assert config.checkpoint.save is not None
    half = replace(config, checkpoint=replace(config.checkpoint, save=config.checkpoint.save.parent / "half"))
    run_leg(replace(half, train=replace(half.train, exit_samples=half.train.train_samples // 2)))
    return half, leg


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (None, set()),
        (lost_moment, {"parameters", "optimizer", "losses", "gradient norms", "validation losses"}),
        (lost_count, {"parameters", "optimizer", "losses", "gradient norms", "validation losses", "training state"}),
        (shifted_sample, {"data order", "losses", "gradient norms", "parameters"}),
        (wrong_random, {"random numbers"}),
    ],
)
def test_what_a_resume_can_lose_is_found(
    spoil: resume.Spoil | None, found: set[str], whole: tuple[RunConfig, Leg], tmp_path: Path
) -> None:
    config, before = whole
    save = config.checkpoint.save
    assert save is not None
    again = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "run", resume=False, load=save))
    state = torch.random.get_rng_state()
    after = run_leg(again, spoil)
    torch.random.set_rng_state(state)
    steps = {step: figures for step, figures in before.steps.items() if step <= 2}
    half = replace(after, steps=steps | after.steps, losses=before.losses | after.losses, data=before.data | after.data)
    if spoil is not wrong_random:
        half = replace(half, random=before.random)  # one process here: what others draw is not the run's
    kinds = [*compare_legs([before], [half]), *compare_checkpoints(save.parent / "whole", tmp_path / "run")]
    wrong = {kind.name for kind in kinds if not kind.holds}
    assert found <= wrong if spoil is not None else wrong == set()
    assert all(kind.first_difference is not None for kind in kinds if not kind.holds)


def test_new_processes_are_spoiled_too(tmp_path: Path) -> None:
    config = small_run(RunConfig(train=TrainConfig(precision="fp32")), tmp_path, steps=1)
    kinds = {kind.name: kind for kind in prove_resume(config, spoil=lost_moment)}
    assert not kinds["parameters"].holds
    assert kinds["random numbers"].holds
    assert kinds["data order"].holds


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig()
    with pytest.raises(ConfigError):
        small_run(replace(config, parallel=replace(config.parallel, context=3)), tmp_path, steps=1)
    assert selftest.main(["resume", "--steps", "0"]) == 2
    assert "there is nothing to stop" in capsys.readouterr().err
    assert selftest.main([]) == 2
    assert selftest.main(["--help"]) == 0
