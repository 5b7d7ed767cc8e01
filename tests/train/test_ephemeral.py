"""Checkpoints on the nodes' own disks: a run goes on from them bit for bit, or says why not and goes further back."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint import staging
from megatron_aquila.checkpoint.manifest import _digest
from megatron_aquila.commands import pretrain
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import AquilaError, CheckpointError, ReplicaError
from megatron_aquila.observe.ledger import read_ledger
from megatron_aquila.observe.lineage import check_ledger
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.train import faults, trainer
from megatron_aquila.train.ephemeral import rank_folder
from megatron_aquila.train.faults import Fault
from megatron_aquila.train.record import RunRecord
from megatron_aquila.train.run import durable_before
from megatron_aquila.train.state import TrainState
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.numbers import flip
from tests.train.runs import VOCAB_SIZE, Recorder, run, split, tiny_config, write_corpus
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


@contextmanager
def dying(at: int) -> Iterator[None]:
    """A run dies before the step after ``at``, when all that was begun is written and published."""
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
        patch.setattr(RunRecord, "stopped", lambda *_, **__: None)
        with pytest.raises(Killed):
            yield


def killed(config: RunConfig, at: int) -> Recorder:
    """The run until it dies before the step after ``at``."""
    recorder = Recorder()
    with dying(at):
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


def loses_its_disk(config: RunConfig) -> None:
    shutil.rmtree(disk(config, 1))


def has_a_flipped_bit(config: RunConfig) -> None:
    flip(disk(config, 0) / "step_0000005" / "rank_00000.safetensors", -1)


def has_parts_of_two_saves(config: RunConfig) -> None:
    """As of two starts that both came to the step, the later one not on all ranks."""
    path = disk(config, 1) / "step_0000005" / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    body["state"]["part"] = "another.0"
    path.write_text(json.dumps(body | {"sha256": _digest(body)}))


@pytest.fixture(scope="module")
def left(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Recorder]:
    """What a run left that was killed after step 5: a durable checkpoint of step 3, an ephemeral one of 5."""
    folder = tmp_path_factory.mktemp("left")
    config = on_nodes(split(tiny_config(folder, eval_interval=0), tp=2), folder / "run of 2")
    return config, pool(2).run(killed, config, 5)[0]


def copied(left: tuple[RunConfig, Recorder], folder: Path) -> RunConfig:
    """The same on disks that a test may damage."""
    config, _ = left
    assert config.checkpoint.save is not None
    shutil.copytree(config.checkpoint.save, folder / "run")
    new = on_nodes(resumed(config, save=folder / "run"), folder / "run of 2")
    for rank in (0, 1):
        shutil.copytree(disk(config, rank), disk(new, rank))
    return new


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (loses_its_disk, "it has no part of it (rank 1)"),
        (has_a_flipped_bit, "step_0000005/rank_00000.safetensors: it is damaged"),
        (has_parts_of_two_saves, "it has no part of it (rank 1)"),
    ],
)
def test_a_part_that_one_rank_lacks_is_no_checkpoint_for_any(
    damage: Callable[[RunConfig], None], reason: str, left: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    config = copied(left, tmp_path)
    damage(config)
    rest = pool(2).run(run, config)[0]
    loud = "\n".join(note for note in rest.notes if note.startswith("EPHEMERAL CHECKPOINT of step 5, not taken"))
    assert reason in loud
    assert "goes on from the last durable checkpoint" in loud
    assert figures(rest)[:2] == figures(left[1])[3:], "steps 4 and 5 again"
    assert rest.reports[-1].step == 6


def test_another_layout_goes_on_from_the_durable_one(
    left: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    config = split(copied(left, tmp_path), pp=2)
    rest = pool(2).run(run, config)[0]
    assert [report.step for report in rest.reports] == [4, 5, 6]
    assert any("written by another layout, in which this rank held" in note for note in rest.notes)
    assert list(disk(config, 0).glob("step_*")) == []


def test_one_rank_instead_of_two(
    left: tuple[RunConfig, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    rest = run(split(copied(left, tmp_path)))
    assert [report.step for report in rest.reports] == [4, 5, 6]
    assert any("written by another layout" in note for note in rest.notes)


def test_who_asks_for_a_step_gets_that_and_what_is_ephemeral_goes(
    left: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    config = copied(left, tmp_path)
    assert config.checkpoint.save is not None
    again = resumed(config, resume=False, load=config.checkpoint.save / "step_0000003", ephemeral_save_interval=2)
    assert [report.step for report in pool(2).run(killed, again, 3)[0].reports] == []
    assert list(disk(config, 1).glob("step_*")) == []


def test_what_does_not_follow_the_last_durable_one_is_of_another_past(
    left: tuple[RunConfig, Recorder], tmp_path: Path, pool: Pools
) -> None:
    config = copied(left, tmp_path)
    assert config.checkpoint.save is not None
    shutil.rmtree(config.checkpoint.save)
    rest = pool(2).run(run, config)[0]
    assert any("it follows step_0000003, but saved last is nothing yet" in note for note in rest.notes)
    assert rest.reports[0].step == 1


def test_a_part_alone_is_nothing_to_load(left: tuple[RunConfig, Recorder], tmp_path: Path) -> None:
    config = split(resumed(left[0], load=disk(left[0], 0) / "step_0000005", resume=False, save=tmp_path))
    with pytest.raises(CheckpointError, match="one rank's part of an ephemeral checkpoint: --resume goes on from it"):
        run(resumed(config, ephemeral_save_interval=None, ephemeral_save_dir=None))


def full(config: RunConfig) -> Recorder:
    """Rank 1's disk is full, but for what is durable."""
    original = staging.write_stream

    def writes(path: Path, parts: Any) -> Any:
        if "disk_of_1" in str(path):
            raise OSError(28, "No space left on device")
        return original(path, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "write_stream", writes)
        patch.setattr(trainer.Loop, "_after_step", after_step_and_wait(trainer.Loop._after_step))
        return run(config)


def test_a_full_disk_of_a_node_is_told_and_counted_and_stops_nobody(pool: Pools, tmp_path: Path) -> None:
    config = on_nodes(split(tiny_config(tmp_path, eval_interval=0), tp=2), tmp_path)
    recorder = pool(2).run(full, config)[0]
    assert recorder.reports[-1].step == 6
    loud = [note for note in recorder.notes if note.startswith("EPHEMERAL SAVE FAILED")]
    assert len(loud) == 4
    assert "step 5, 4 in a row: on 1 of 2 ranks, rank 1: " in loud[-1]
    assert "No space left on device" in loud[-1]
    assert [event["outcome"] for event in recorder.events if event["event"] == "ephemeral"] == ["failed"] * 4


def test_a_folder_that_cannot_be_made_stops_nobody_a_variable_that_is_not_set_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    config = on_nodes(tiny_config(tmp_path, train_samples=16), tmp_path)
    recorder = run(resumed(config, ephemeral_save_dir=str(tmp_path / "file" / "below"), async_save=False))
    assert any("1 in a row: on 1 of 1 ranks, rank 0: " in note for note in recorder.notes)
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(CheckpointError, match=r"--ephemeral-save-dir /local/\$NOT_SET: a variable in it is not set"):
        run(resumed(config, ephemeral_save_dir="/local/$NOT_SET"))


def lost_once(config: RunConfig, gone: list[Path]) -> Any:
    """``Steps.take`` that finds a fault in step 5, once; ``gone`` are the parts that were there."""
    original = trainer.Steps.take

    def faulty(steps: trainer.Steps, state: Any, *, stop_requested: bool) -> Any:
        step = original(steps, state, stop_requested=stop_requested)
        if step is not None and step.state.step == 5 and not gone:
            gone.extend(disk(config, 0).glob("step_*"))
            steps.fault = Fault(policy="rewind", step=5, samples=step.samples, reason="a bit flipped")
        return step

    return faulty


def on_one_node(folder: Path, **train: Any) -> RunConfig:
    """The run of one rank, whose disk is the folder's."""
    return resumed(
        on_nodes(tiny_config(folder, eval_interval=0, **train), folder), ephemeral_save_dir=str(folder / "here")
    )


def parts(config: RunConfig, rank: int = 0) -> list[str]:
    return sorted(path.name for path in disk(config, rank).glob("step_*"))


def test_a_run_that_goes_back_leaves_no_part_of_what_it_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, left_over, load = on_one_node(tmp_path), [["never loaded"]], faults.load_weights

    def looks(*args: Any) -> Any:
        left_over[:] = [parts(config)]
        return load(*args)

    gone: list[Path] = []
    monkeypatch.setattr(trainer.Steps, "take", lost_once(config, gone))
    monkeypatch.setattr(faults, "load_weights", looks)
    monkeypatch.setattr(trainer.Loop, "_after_step", after_step_and_wait(trainer.Loop._after_step))
    recorder = run(config)
    assert [path.name for path in gone] == ["step_0000004"]
    assert any("back to step_0000003, step 3" in note for note in recorder.notes)
    assert left_over == [[]]


@pytest.mark.parametrize(("owner", "name"), [(trainer.Rewinder, "_check"), (RunRecord, "rewound")])
def test_a_run_that_cannot_go_back_keeps_its_newest_work(
    owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise AquilaError("there is nothing to go back to")

    config = on_one_node(tmp_path)
    monkeypatch.setattr(trainer.Steps, "take", lost_once(config, []))
    monkeypatch.setattr(trainer.Loop, "_after_step", after_step_and_wait(trainer.Loop._after_step))
    monkeypatch.setattr(owner, name, refuses)
    with pytest.raises(AquilaError, match="nothing to go back to"):
        run(config)
    assert parts(config) == ["step_0000004"]


def test_where_replicas_have_drifted_apart_no_part_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = on_one_node(tmp_path, check_replicas=2), []

    def not_masters(_: DistributedOptimizer) -> list[str]:
        seen.extend(parts(config))
        return ["model.norm.weight"]

    monkeypatch.setattr(DistributedOptimizer, "not_masters", not_masters)
    monkeypatch.setattr(trainer.Loop, "_after_step", after_step_and_wait(trainer.Loop._after_step))
    with pytest.raises(ReplicaError):
        run(config)
    assert (seen, parts(config)) == (["step_0000001"], [])


def killed_with_a_full_disk(config: RunConfig, at: int) -> None:
    """Rank 1's disk is full after its first part."""
    original = staging.write_stream

    def writes(path: Path, parts: Any) -> Any:
        if "disk_of_1" in str(path) and "step_0000001" not in str(path):
            raise OSError(28, "No space left on device")
        return original(path, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "write_stream", writes)
        killed(config, at)


def test_saves_that_fail_leave_the_last_good_part_and_no_other(pool: Pools, tmp_path: Path) -> None:
    config = resumed(on_nodes(split(tiny_config(tmp_path, eval_interval=0), tp=2), tmp_path), save_interval=6)
    pool(2).run(killed_with_a_full_disk, config, 3)
    assert [parts(config, rank) for rank in (0, 1)] == [["step_0000001"]] * 2


def test_a_part_that_was_trained_on_what_is_to_be_left_out_is_passed_over(tmp_path: Path) -> None:
    killed(on_one_node(tmp_path), 5)
    recorder = run(on_one_node(tmp_path, skip_samples=("32-39",)))
    (loud,) = [note for note in recorder.notes if note.startswith("EPHEMERAL CHECKPOINT")]
    assert "--skip-samples 32-39" in loud
    assert recorder.reports[0].step == 4


def test_a_part_at_the_end_of_the_run_is_saved_for_good(tmp_path: Path) -> None:
    killed(on_one_node(tmp_path), 5)
    config = on_one_node(tmp_path, exit_samples=40)
    assert run(config).reports == []
    assert config.checkpoint.save is not None
    assert (config.checkpoint.save / "latest").read_text() == "step_0000005\n"
    assert parts(config) == []


def test_a_run_from_another_folder_goes_on_from_its_parts_before_its_first_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "--num-layers 1 --hidden-size 16 --num-heads 2 --ffn-size 16 --seq-len 16 --device cpu --precision fp32"
    words = f"{model} --gbs 8 --train-samples 48 --eval-interval 0 --split 1 --vocab-size {VOCAB_SIZE}".split()
    words += ["--data-cache-path", str(tmp_path / "cache"), "--data-path", *write_corpus(tmp_path)]
    other, own = tmp_path / "other" / "step_0000002", tmp_path / "own"
    assert pretrain.main([*words, "--save", str(other.parent), "--exit-samples", "16"]) == 0
    assert pretrain.main([*words, "--load", str(other), "--save", str(tmp_path / "never")]) == 0
    words += ["--save", str(own), "--ephemeral-save-interval", "1", "--ephemeral-save-dir", str(tmp_path / "here")]
    with dying(4):
        pretrain.main([*words, "--load", str(other)])
    with dying(5):
        pretrain.main([*words, "--load", "auto"])
    assert pretrain.main([*words, "--resume"]) == 0  # from a part of a run that began from a part
    assert [event["step"] for event in read_ledger(own) if event["event"] == "start"] == [2, 4, 5]
    report = check_ledger(read_ledger(own))
    assert report.holds, report.problems
    expected, found = tensors(tmp_path / "never"), tensors(own)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    capsys.readouterr()


def test_what_is_not_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    state = TrainState(seed=1, index_segments=(48,), parent="step_0000003")
    config = tiny_config(tmp_path)
    assert durable_before(config, state) is None
    assert config.checkpoint.save is not None
    (config.checkpoint.save / "step_0000003").mkdir(parents=True)
    (config.checkpoint.save / "step_0000003" / "manifest.json").touch()
    assert durable_before(config, state) == config.checkpoint.save / "step_0000003"
