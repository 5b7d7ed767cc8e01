"""A step waits for the hosts of the other ranks and never for the device, which tells of it one step late.

The device that proves it is ``meta``: its tensors hold no values, so whoever asks for one raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import AquilaError, DataError
from megatron_aquila.optim.clip import Clip
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train import build, corpus, faults, start, step, trainer
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.launcher import Launch
from megatron_aquila.verify.dry import META, dry_machine
from tests.train.runs import Recorder, run, tiny_config

APART = {"seconds", "data_seconds", "memory_bytes"}  # what no two runs have in common


def on(device: torch.device, config: RunConfig) -> tuple[Machine, Corpus, Any]:
    """A machine on ``device``, its data and its first state; weights are whatever they are."""
    derived = derive(config, 1)
    state = start.fresh_state(config, derived)
    if device == META:
        machine = dry_machine(config, 1)
    else:
        machine = build.build_machine(config, derived, build.create_context(config, derived, device))
    identity, segments = corpus.identify(config), state.index_segments
    ctx = machine.ctx
    return machine, corpus.build_corpus(config, derived, ctx, Launch(), segments=segments, identity=identity), state


@contextmanager
def running_ahead() -> Iterator[None]:
    """On the CPU, tell of steps as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "runs_ahead", lambda machine: True)
        yield


def without_numbers(*steps: int) -> Any:
    """``clip`` of an optimizer whose gradients are not finite at ``steps``, the first being 1."""
    right, seen = DistributedOptimizer.clip, iter(range(1, 1000))

    def clip(self: DistributedOptimizer, max_norm: float, *, loss_scale: float = 1.0) -> Clip:
        found = right(self, max_norm, loss_scale=loss_scale)
        return replace(found, applies=torch.tensor(False)) if next(seen) in steps else found

    return clip


def documents(config: RunConfig) -> RunConfig:
    """With documents kept apart: their bounds are read by the host."""
    return replace(config, data=replace(config.data, reset_attention_mask=True, eod_mask_loss=True, eod_token_id=3))


NO_ADDMM = pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch has no addmm into another type on meta")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=NO_ADDMM)])
def test_a_step_asks_the_device_for_nothing(precision: str, tmp_path: Path) -> None:
    machine, data, state = on(META, tiny_config(tmp_path, precision=precision))
    launched = trainer.train_step(machine, data, state, stop_requested=False)
    launched = trainer.train_step(machine, data, launched.state, stop_requested=False)
    data.close()
    assert (launched.state.step, launched.state.consumed_samples) == (2, 16)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        launched.outcome(launched.state, machine.scaling)


def test_a_step_that_asks_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, data, state = on(META, tiny_config(tmp_path, precision="fp32", global_batch=2))
    right = DistributedOptimizer.step
    for ask in (bool, float, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero):

        def asking(self: DistributedOptimizer, lr: float, clip: Clip, ask: Any = ask) -> None:
            ask(clip.applies)
            right(self, lr, clip)

        monkeypatch.setattr(DistributedOptimizer, "step", asking)
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            trainer.train_step(machine, data, state, stop_requested=False)
    data.close()


def test_what_ranks_agree_on_is_counted_on_the_host(tmp_path: Path) -> None:
    config = documents(tiny_config(tmp_path))
    ctx = replace(ParallelContext.single(), device=META)
    _, data, _ = on(torch.device("cpu"), config)
    counts = step.agree(ctx, data.train.fetch(0, 8))
    data.close()
    assert 0 < counts.num_tokens < 8 * 16
    assert 0 < counts.attended < 8 * 16**2


def rows(recorder: Recorder) -> list[dict[str, Any]]:
    names = [name for name in type(recorder.reports[0]).__dataclass_fields__ if name not in APART]
    return [{name: getattr(report, name) for name in names} for report in recorder.reports]


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = CheckpointReader(folder)
    return reader.state["train"], {name: reader.read(name) for name in reader.tensors}


def test_telling_one_step_late_changes_no_row_and_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedOptimizer, "clip", without_numbers(3, 4))
    config = tiny_config(tmp_path)
    at_once = run(config)
    monkeypatch.setattr(DistributedOptimizer, "clip", without_numbers(3, 4))
    with running_ahead():
        late = run(replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "late")))
    assert rows(late) == rows(at_once)
    assert [report.applied for report in late.reports] == [True, True, False, False, True, True]
    assert late.validations == at_once.validations
    for name in ("step_0000002", "step_0000004", "step_0000006"):
        (state, tensors), (expected, others) = (saved(tmp_path / folder / name) for folder in ("late", "run"))
        assert state == expected
        assert all(torch.equal(tensors[key], others[key]) for key in others)
    assert expected["skipped_samples"] == [[16, 32]]
    assert expected["applied_steps"] == 4


def test_steps_are_told_late_and_before_what_follows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    right = trainer.train_step

    def launching(machine: Machine, data: Corpus, state: Any, *, stop_requested: bool) -> Any:
        events.append(f"launch {state.step + 1}")
        return right(machine, data, state, stop_requested=stop_requested)

    class Telling(Recorder):
        def step(self, report: Any) -> None:
            events.append(f"row {report.step}")

    monkeypatch.setattr(trainer, "train_step", launching)
    config = tiny_config(tmp_path, eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=4))
    with running_ahead():
        run(config, recorder=Telling())
    order = "launch 1, launch 2, row 1, launch 3, row 2, launch 4, row 3, row 4, launch 5, launch 6, row 5, row 6"
    assert events == order.split(", ")


def test_a_run_stopped_while_a_step_is_under_way_resumes_without_a_seam(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    whole = run(config)
    config = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "again", save_interval=100))
    with running_ahead():
        stopped = run(config, kill_at=2)
        resumed = run(replace(config, checkpoint=replace(config.checkpoint, resume=True)))
    assert "SIGTERM" in stopped.notes[-1]
    assert [report.step for report in stopped.reports] == [1, 2, 3]
    assert rows(stopped) + rows(resumed) == rows(whole)


def test_a_lost_run_is_found_one_step_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MAX_NOT_APPLIED", 3)
    monkeypatch.setattr(DistributedOptimizer, "clip", without_numbers(*range(1, 7)))
    config = tiny_config(tmp_path, eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=100))
    recorder = Recorder()
    with running_ahead(), pytest.raises(AquilaError, match=r"step 3: .*samples 0 to 24"):
        run(config, recorder=recorder)
    assert [report.step for report in recorder.reports] == [1, 2, 3]


def test_the_row_of_a_step_is_not_lost_when_the_next_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.read_batches

    def read(loader: Any, consumed: int, global_batch: int) -> Any:
        return ([], DataError("torn")) if consumed == 16 else right(loader, consumed, global_batch)

    monkeypatch.setattr(step, "read_batches", read)
    config = tiny_config(tmp_path, eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=100))
    recorder = Recorder()
    with running_ahead(), pytest.raises(DataError, match="torn"):
        run(config, recorder=recorder)
    assert [report.step for report in recorder.reports] == [1, 2]


def test_a_dynamic_loss_scale_and_a_cpu_wait_for_each_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, precision="fp16")
    machine, data, _ = on(torch.device("cpu"), config)
    data.close()
    gpu = replace(machine, ctx=replace(machine.ctx, device=torch.device("cuda", 0)))
    constant = replace(gpu, scaling=build.loss_scaling(tiny_config(tmp_path)))
    assert [trainer.runs_ahead(each) for each in (machine, gpu, constant)] == [False, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path: Path) -> None:
    machine, data, state = on(torch.device("cuda", 0), documents(tiny_config(tmp_path, precision="bf16")))
    told = []
    for number in range(4):  # the first loads kernels, which may wait
        torch.cuda.set_sync_debug_mode("error" if number > 0 else "default")
        try:
            launched = trainer.train_step(machine, data, state, stop_requested=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        state = launched.state
        told.append(launched)
    reports = [launched.outcome(state, machine.scaling).report for launched in told]
    data.close()
    assert all(report.seconds > 0 for report in reports)
