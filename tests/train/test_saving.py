"""Training that goes on while it is saved: the same bits, one save at a time, and a failure is everyone's."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint import staging
from megatron_aquila.checkpoint.integrity import examine
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import CheckpointError, CommunicationError, DataError, RunFolderError
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.train import record, trainer
from megatron_aquila.train.releases import Releases
from megatron_aquila.train.saving import Saver
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.numbers import flip
from tests.train.runs import Recorder, run, split, tiny_config
from tests.train.test_resume import figures, resumed, tensors

Pools = Callable[[int], WorkerPool]


def written_late(config: RunConfig, late: bool) -> Recorder:
    """With ``late`` the threads write nothing before the loop waits for them: steps are taken in between."""
    gate, original, finish = threading.Event(), staging.write_stream, Saver.finish

    def waits(*args: object) -> object:
        assert gate.wait(30), "nobody waited for the save"
        return original(*args)  # type: ignore[arg-type]

    def opens(saver: Saver) -> None:
        gate.set()
        finish(saver)
        gate.clear()

    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(staging, "write_stream", waits)
            patch.setattr(Saver, "finish", opens)
        return run(config)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_what_is_saved_is_the_step_that_was_whichever_come_after(precision: str, pool: Pools, tmp_path: Path) -> None:
    config = split(tiny_config(tmp_path, precision=precision, eval_interval=0), tp=2)
    at_once = pool(2).run(run, resumed(config, async_save=False, save=tmp_path / "at once"))[0]
    late = pool(2).run(written_late, config, True)[0]
    assert figures(late) == figures(at_once)
    assert config.checkpoint.save is not None
    for step in ("step_0000002", "step_0000004", "step_0000006"):
        expected, found = tensors(tmp_path / "at once" / step), tensors(config.checkpoint.save / step)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), step
        assert examine(config.checkpoint.save / step) == []
    assert [step for step, _ in late.stalls] == [2, 4, 6]
    assert any("step 4 waits for the one before" in note for note in late.notes)
    again = resumed(config, load=config.checkpoint.save / "step_0000002", save=tmp_path / "again")
    assert figures(pool(2).run(run, again)[0]) == figures(at_once)[2:]


def failing(config: RunConfig) -> tuple[str, list[int]]:
    """The disk of rank 1 is full; the error, and the steps that were taken."""
    recorder = Recorder()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(staging, "write_stream", full)
        with pytest.raises(CheckpointError) as caught:
            run(config, recorder=recorder)
    return str(caught.value), [report.step for report in recorder.reports]


def test_a_failure_of_one_writer_is_everyones_in_the_next_step(pool: Pools, tmp_path: Path) -> None:
    config = resumed(split(tiny_config(tmp_path), tp=2), save_interval=2)
    outcomes = pool(2).run(failing, config)
    message, steps = outcomes[0]
    assert outcomes[1][0] == message
    assert "step_0000002: it could not be saved: [Errno 28] No space left on device (rank 1)" in message
    assert steps in ([1, 2], [1, 2, 3])
    assert config.checkpoint.save is not None
    assert not list(config.checkpoint.save.glob("step_*"))


def test_a_step_that_fails_on_all_ranks_still_publishes_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resumed(tiny_config(tmp_path), save_interval=2)
    original = trainer.train_step

    def breaks(*args: object, **kwargs: object) -> object:
        if args[2].step == 2:  # type: ignore[attr-defined]
            raise CheckpointError("the third step")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", breaks)
    monkeypatch.setattr(Saver, "poll", lambda saver: None)
    with pytest.raises(CheckpointError, match="the third step"):
        run(config)
    assert config.checkpoint.save is not None
    assert (config.checkpoint.save / "latest").read_text() == "step_0000002\n"


@pytest.mark.parametrize("error", [RunFolderError, CommunicationError])
def test_who_has_lost_the_folder_or_another_rank_publishes_nothing(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks are not at this place: whoever waited for them in a save would mix up two transfers."""
    original = trainer.train_step

    def breaks(*args: object, **kwargs: object) -> object:
        if args[2].step == 2:  # type: ignore[attr-defined]
            raise error("lost")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", breaks)
    monkeypatch.setattr(Saver, "poll", lambda saver: None)
    with pytest.raises(error, match="lost"):
        run(resumed(tiny_config(tmp_path), save_interval=2))
    assert not (tmp_path / "run" / "latest").exists()


def test_a_validation_that_fails_on_all_ranks_still_publishes_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: object, **kwargs: object) -> object:
        raise CheckpointError("the validation")

    monkeypatch.setattr(trainer, "evaluate", breaks)
    monkeypatch.setattr(Saver, "poll", lambda saver: None)
    with pytest.raises(CheckpointError, match="the validation"):
        run(resumed(tiny_config(tmp_path), save_interval=2))
    assert (tmp_path / "run" / "latest").read_text() == "step_0000002\n"


def test_little_memory_is_a_longer_stall_and_nothing_else(tmp_path: Path) -> None:
    config = resumed(tiny_config(tmp_path, train_samples=16), save_staging_gib=1e-9)
    recorder = run(config)
    assert config.checkpoint.save is not None
    assert examine(config.checkpoint.save / "step_0000002") == []
    assert recorder.stalls[0][1] < 60


def test_a_stall_for_the_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.Staging, "_take", slow_take)
    recorder = run(tiny_config(tmp_path, train_samples=16))
    assert any("for the disk: a larger --save-staging-gib" in note for note in recorder.notes)


def slow_take(memory: staging.Staging) -> torch.Tensor:
    memory.waited_seconds += 1.0
    return torch.empty(memory._block_bytes, dtype=torch.uint8)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(pool: Pools, tmp_path: Path) -> None:
    config = split(tiny_config(tmp_path), tp=2)
    never = pool(2).run(run, config)[0]
    assert config.checkpoint.save is not None
    flip(config.checkpoint.save / "step_0000006" / "rank_00001.safetensors", -1)
    after = pool(2).run(run, resumed(config, resume=True))[0]
    assert figures(after) == figures(never)[4:]
    assert examine(config.checkpoint.save / "step_0000006") == []
    (config.checkpoint.save / "latest").unlink()
    again = pool(2).run(run, resumed(config, resume=True))[0]
    assert again.reports == []
    (config.checkpoint.save / "latest").write_text("step_0000006")
    flip(config.checkpoint.save / "step_0000006" / "rank_00001.safetensors", -1)
    with pytest.raises(CheckpointError, match="it is damaged"):
        run(split(resumed(config, resume=True, on_corrupt="stop")))


def test_old_ones_that_cannot_be_removed_are_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr("megatron_aquila.train.saving.prune", refuses)
    recorder = run(resumed(tiny_config(tmp_path, train_samples=16), keep=1, keep_every=4))
    assert any("were not removed: read-only" in note for note in recorder.notes)


def failing_before_it_is_begun(config: RunConfig) -> str:
    """Rank 1 cannot read the samples that come next."""

    def unread(*args: object) -> object:
        raise DataError("threes.bin: cut off")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(record, "upcoming", unread)
        with pytest.raises(CheckpointError) as caught:
            run(config)
    return str(caught.value)


def test_a_rank_that_cannot_read_what_comes_next_is_everyones_failure(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(failing_before_it_is_begun, split(tiny_config(tmp_path))) == ["threes.bin: cut off (rank 1)"] * 2


def test_the_last_gathers_are_awaited_before_rank_0_waits_for_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for owner, name in ((DistributedOptimizer, "settle"), (Releases, "wait"), (Saver, "finish")):
        right = getattr(owner, name)

        def noted(self: object, *args: object, right: Any = right, name: str = name) -> object:
            order.append(name)
            return right(self, *args)

        monkeypatch.setattr(owner, name, noted)
    run(tiny_config(tmp_path, eval_interval=0))
    assert order[-3:] == ["finish", "settle", "wait"]
