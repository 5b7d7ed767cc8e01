"""A run that ends between a rewind and its next checkpoint: what was left out stays left out, and the ledger knows."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.commands import pretrain
from megatron_aquila.observe.ledger import Event, read_ledger
from megatron_aquila.observe.lineage import LedgerReport, check_ledger
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.train import faults, report
from megatron_aquila.train.record import RunRecord
from tests.train.runs import VOCAB_SIZE, write_corpus
from tests.train.test_faults import poisoned

MODEL = "--num-layers 1 --hidden-size 16 --num-heads 2 --ffn-size 16 --seq-len 16 --device cpu --precision fp32"
RUN = "--gbs 8 --train-samples 48 --eval-interval 0 --split 1 --save-interval 2 --on-nonfinite rewind"

Patch = pytest.MonkeyPatch


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be written after it."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def at_note(action: Callable[[], None], after: int = 0) -> Callable[[Patch], None]:
    """Do it when the run says that it went back, or so many steps later."""

    def install(patch: Patch) -> None:
        steps: list[int] = []  # since it went back
        note, step = report.RankZeroReporter.note, report.RankZeroReporter.step

        def noted(self: Any, text: str | None) -> None:
            note(self, text)
            if text is not None and text.startswith("back to"):
                steps.append(0)
                if after == 0:
                    action()

        def stepped(self: Any, row: Any) -> None:
            step(self, row)
            if steps:
                steps[0] += 1
                if steps[0] == after:
                    action()

        patch.setattr(report.RankZeroReporter, "note", noted)
        patch.setattr(report.RankZeroReporter, "step", stepped)

    return install


MOMENTS: dict[str, Callable[[Patch], None]] = {
    "killed before the tensors are loaded": lambda patch: patch.setattr(faults, "load_weights", killed),
    "killed before the next step": at_note(killed),
    "killed before the next save": at_note(killed, after=1),
    "stopped before the next step": at_note(lambda: signal.raise_signal(signal.SIGTERM)),
    "stopped before the next save": at_note(lambda: signal.raise_signal(signal.SIGTERM), after=1),
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    words = f"{MODEL} {RUN} --vocab-size {VOCAB_SIZE} --data-cache-path {folder / 'cache'}".split()
    return [*words, "--data-path", *write_corpus(folder)]


@pytest.fixture(scope="module")
def plain(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """The end of the run that leaves out samples from the start, to be had once."""
    ends: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def end(first: int, stop: int) -> dict[str, torch.Tensor]:
        if (first, stop) not in ends:
            run = tmp_path_factory.mktemp("plain") / "run"
            assert pretrain.main([*flags, "--save", str(run), "--skip-samples", f"{first}-{stop - 1}"]) == 0
            ends[first, stop] = tensors(run)
        return ends[first, stop]

    return end


def befallen(arguments: list[str], bad_step: int, moment: str = "") -> None:
    """A start whose gradients are not finite at a call of ``clip``, and that ends at the moment, or as planned."""
    with Patch.context() as patch:
        patch.setattr(DistributedOptimizer, "clip", poisoned({bad_step}, torch.nan))
        if moment:
            MOMENTS[moment](patch)
        if moment.startswith("killed"):
            patch.setattr(RunRecord, "stopped", lambda *_, **__: None)
            with pytest.raises(Killed):
                pretrain.main(arguments)
        else:
            assert pretrain.main(arguments) == 0


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {name: reader.read(name) for name in reader.tensors}


def holds(run: Path) -> tuple[LedgerReport, list[Event]]:
    events = read_ledger(run)
    found = check_ledger(events)
    assert found.holds, found.problems
    return found, events


@pytest.mark.parametrize(
    ("moment", "bad_step", "left_out"),
    [*((moment, 4, (24, 32)) for moment in MOMENTS), ("killed before the next step", 6, (40, 48))],
)
def test_what_a_rewind_left_out_is_left_out_by_the_next_start(
    moment: str, bad_step: int, left_out: tuple[int, int], flags: list[str], plain: Any, tmp_path: Path
) -> None:
    arguments = [*flags, "--save", str(tmp_path), "--resume"]
    befallen(arguments, bad_step, moment)
    holds(tmp_path)
    assert pretrain.main(arguments) == 0
    found, events = holds(tmp_path)
    assert (found.skipped, found.rewinds) == ((left_out,), 1)
    *_, last = [event for event in events if event["event"] == "start"]
    assert list(left_out) in last["skipped"]
    assert last["checkpoint"]["step"] == bad_step - 2 + (moment == "stopped before the next save")
    expected, ours = plain(*left_out), tensors(tmp_path)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_next_start_that_goes_back_too_leaves_both_out(flags: list[str], tmp_path: Path) -> None:
    arguments = [*flags, "--save", str(tmp_path), "--resume"]
    befallen(arguments, 4, "killed before the next step")
    befallen(arguments, 1)
    assert holds(tmp_path)[0].skipped == ((16, 32),)


def test_a_run_that_came_from_another_folder_goes_back_there_and_remembers_in_its_own(
    flags: list[str], tmp_path: Path
) -> None:
    other, run, third = tmp_path / "other", tmp_path / "run", tmp_path / "third"
    assert pretrain.main([*flags, "--save", str(other), "--exit-samples", "16"]) == 0
    arguments = [*flags, "--load", str(other / "step_0000002"), "--save", str(run)]
    befallen(arguments, 2, "killed before the next step")
    arguments[arguments.index("--load") + 1] = str(
        other / ".." / "other" / "step_0000002"
    )  # the same, otherwise spelled
    assert pretrain.main(arguments) == 0
    assert holds(run)[0].skipped == ((24, 32),)
    assert pretrain.main([*flags, "--load", str(other / "step_0000002"), "--save", str(third)]) == 0
    assert holds(third)[0].skipped == (), "of another run"


def test_a_damaged_ledger_is_said_before_anything_is_built(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*flags, "--save", str(tmp_path), "--resume"]
    assert pretrain.main([*arguments, "--exit-samples", "16"]) == 0
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("no event\n" + ledger.read_text())
    assert pretrain.main(arguments) == 2
    assert "ledger.jsonl:1: not an event of a ledger" in capsys.readouterr().err
