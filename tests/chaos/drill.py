"""One run, fault after fault: each has to be recovered from or refused, and the end is that of a run without any."""

import contextlib
import io
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from megatron_aquila.checkpoint.folders import complete_steps, find_checkpoint, step_of
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.commands import doctor
from megatron_aquila.observe.ledger import Event, read_ledger
from megatron_aquila.observe.lineage import check_ledger
from tests.chaos.damage import damage
from tests.chaos.faults import BAD_NUMBERS, KINDS, Fault
from tests.chaos.hooks import Marks, Plan
from tests.chaos.launch import Forked, Running, Torchrun
from tests.train.runs import VOCAB_SIZE, write_corpus

BATCH = 8
LONGEST = 120  # steps of the run without faults
GRACE = 30.0  # seconds for the other rank to notice
LIMIT = 300.0  # seconds; a loaded machine takes its time
LAYOUTS = {"dp 2": (), "pp 2": ("--pp", "2")}


@dataclass
class Outcome:
    """What became of one fault. ``lost``: samples of a good checkpoint that a later start did not go on from."""

    fault: Fault
    launcher: str
    layout: str
    fired: bool = False
    refused: bool = False
    recovered: bool = False
    lost: int = 0
    seconds: float | None = None
    wrong: list[str] = field(default_factory=list)


@dataclass
class Ground:
    """Where runs are made: the corpus and, a layout, the run that nothing befalls."""

    folder: Path
    prefixes: list[str]
    words: str

    @classmethod
    def prepare(cls, folder: Path) -> "Ground":
        """Write the corpus into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = write_corpus(folder)
        return cls(folder, [path[1], path[3]], ", ".join(map(repr, path)))

    def flags(self, run: Path, layout: str, *more: str) -> list[str]:
        """The command line of a run of this ground."""
        config = self.folder / "run.yaml"
        config.write_text(
            f"""
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_size: 48, vocab_size: {VOCAB_SIZE},
  vocab_multiple: 8, seq_len: 16}}
data: {{path: [{self.words}], split: "90,10,0", cache_path: {self.folder / "cache"}}}
optim: {{lr: 1.0e-2, min_lr: 1.0e-3, lr_warmup_samples: 8}}
train: {{train_samples: {BATCH * LONGEST}, micro_batch: 2, global_batch: {BATCH}, precision: fp32, device: cpu,
  eval_interval: 3, eval_iters: 3, check_replicas: 1}}
checkpoint: {{save_interval: 2}}
"""
        )
        return ["--config", str(config), *LAYOUTS[layout], "--save", str(run), "--resume", *more]

    def expected(self, layout: str, step: int) -> dict[str, bytes]:
        """The tensor files of a step of the run that nothing befalls; it is taken further as needed."""
        run, out = self.folder / f"whole {layout}", self.folder / "whole.out"
        folder = run / f"step_{step:07d}"
        if not folder.exists():
            plan = Plan(Marks(self.folder), (), None).write(self.folder / "whole.plan")
            until = ("--exit-samples", str(min(LONGEST, step + 12) * BATCH))
            statuses = Forked(plan, self.flags(run, layout, *until), out).wait(seconds=LIMIT, grace=GRACE)
            assert statuses == [0, 0], out.read_text()
        return tensor_files(folder)


def tensor_files(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensor files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@contextmanager
def small_disk(folder: Path, *, mebibytes: int = 24) -> Iterator[bool]:
    """``folder`` on a small disk of its own, where this process may mount one; whether it is."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Drill:
    """One run and its faults, in order. ``restarts``: torchrun starts the run again, else each start is forked."""

    def __init__(
        self,
        ground: Ground,
        folder: Path,
        faults: Sequence[Fault],
        *,
        layout: str,
        torchrun: bool,
        is_small: bool = False,
    ) -> None:
        """``folder``: of the run, which ``is_small``: a disk of its own that may be filled."""
        self._ground, self._layout, self._torchrun = ground, layout, torchrun
        self._run, beside = folder / "run", ground.folder / folder.name
        self._out, self._plan = beside / "out", beside / "plan"
        self._marks = Marks(beside / "marks")
        self._marks.folder.mkdir(parents=True)
        self._filler = folder / "filler" if is_small else None
        self.outcomes = [Outcome(fault, "torchrun" if torchrun else "forked", layout) for fault in faults]
        self._starts, self._known = 0, list[str]()
        self._pending: list[Outcome] = []

    def go(self) -> list[Outcome]:
        """Let everything happen, and judge it."""
        try:
            self._start([])
            for (together, _), outcomes in groupby(
                self.outcomes, key=lambda one: (self._is_restarted(one), policy(one))
            ):
                if together:
                    self._start(list(outcomes))
                else:
                    for outcome in outcomes:
                        self._befall(outcome)
            self._start([])
            self._compare()
        except Exception as error:
            unfinished = [outcome for outcome in self.outcomes if not outcome.fired or outcome in self._pending]
            for outcome in unfinished[:1] or self.outcomes[-1:]:
                outcome.wrong.append(f"the drill ended here: {type(error).__name__}: {error}")
            for outcome in unfinished:
                outcome.recovered = False
        return self.outcomes

    def _is_restarted(self, outcome: Outcome) -> bool:
        """Whether torchrun itself starts the run again after it."""
        kind = outcome.fault.kind
        return self._torchrun and KINDS[kind].inside and kind != "two-runs" and self._ends(kind) and kind != "hang"

    @staticmethod
    def _ends(kind: str) -> bool:
        return KINDS[kind].ending in ("dies", "refuses")

    def _befall(self, outcome: Outcome) -> None:
        kind = outcome.fault.kind
        if kind == "two-runs":
            self._two_runs(outcome)
        elif KINDS[kind].inside:
            self._start([outcome])
        else:
            self._damaged(outcome)

    def _launch(self, outcomes: Sequence[Outcome], *more: str, restarts: int = 0, out: Path | None = None) -> Running:
        flags = self._ground.flags(self._run, self._layout, *more)
        out = self._out if out is None else out
        faults = tuple(outcome.fault for outcome in outcomes)
        plan = Plan(self._marks, faults, self._filler).write(self._plan)
        return Torchrun(plan, flags, out, restarts=restarts) if self._torchrun else Forked(plan, flags, out)

    def _until(self, steps: int) -> tuple[str, str]:
        """To an even step at least so many ahead."""
        step = self._step()
        until = step + steps + (step + steps) % 2
        assert until <= LONGEST, f"the run without faults has {LONGEST} steps, this one would take {until}"
        return "--exit-samples", str(BATCH * until)

    def _step(self) -> int:
        """Of the newest checkpoint that is there, damaged or not."""
        return max(complete_steps(self._run), default=0) if self._run.exists() else 0

    def _start(self, outcomes: list[Outcome], *more: str) -> str:
        """Start the run, with ``more`` flags, let the faults come, and judge those before; what it printed."""
        kinds = [outcome.fault.kind for outcome in outcomes]
        (wanted,) = {policy(outcome) for outcome in outcomes} or {None}
        flags = [*more, *([] if wanted is None else ["--on-nonfinite", wanted])]
        flags += ["--timeout-minutes", "0.1", "--hang-dump-seconds", "1"] if "hang" in kinds else []
        said_before = self._said()
        steps = 2 if not outcomes else 4 + 5 * len(outcomes)
        running = self._launch(
            outcomes, *self._until(steps if self._starts else 4), *flags,
            restarts=len(outcomes) if self._torchrun and all(map(self._is_restarted, outcomes)) else 0,
        )  # fmt: skip
        if kinds == ["hang"]:
            self._find_hung(outcomes[0], running)
        statuses = running.wait(seconds=LIMIT * max(1, len(outcomes)), grace=GRACE)
        said = self._said()[len(said_before) :]
        self._judge_starts()
        for outcome in outcomes:
            self._judge(outcome, statuses, said)
        if not outcomes and any(statuses):
            raise RuntimeError(f"a start without a fault ended with {statuses}: {said[-1500:]}")
        return said

    def _said(self) -> str:
        return self._out.read_text(errors="replace") if self._out.exists() else ""

    def _judge(self, outcome: Outcome, statuses: list[int], said: str) -> None:
        """Whether the start that the fault befell ended as it had to."""
        kind, fired = KINDS[outcome.fault.kind], self._marks.fired(outcome.fault.number)
        outcome.fired = fired.exists()
        if not outcome.fired:
            outcome.wrong.append(f"it did not come: the run ended with {statuses}: {said[-1500:]}")
            return
        if kind.reason not in said:
            outcome.wrong.append(f"{kind.reason!r} was not said: {said[-1500:]}")
        if self._torchrun and self._is_restarted(outcome):
            if any(statuses):
                outcome.wrong.append(f"torchrun ended with {statuses}: {said[-1500:]}")
        elif kind.ending in ("stops", "goes on"):
            if any(statuses):
                outcome.wrong.append(f"the start ended with {statuses}: {said[-1500:]}")
        elif 0 in statuses or (kind.ending == "refuses" and (kind.status or 2) not in statuses and not self._torchrun):
            outcome.wrong.append(f"the start ended with {statuses}: {said[-1500:]}")
        outcome.refused = kind.ending == "refuses"
        self._pending.append(outcome)
        self._settle()

    def _settle(self) -> None:
        """Those faults are recovered from after which a step was taken, and how long that took."""
        for outcome in tuple(self._pending):
            number = outcome.fault.number
            after = [self._marks.stepped(later) for later in range(number + 1, len(self.outcomes) + 1)]
            steps = [float(path.read_text().split()[0]) for path in after if path.exists()]
            if steps:
                outcome.seconds = min(steps) - float(self._marks.fired(number).read_text().split()[0])
                outcome.recovered = not outcome.wrong
                self._pending.remove(outcome)

    def _judge_starts(self) -> None:
        """What the ledger says of the starts since the last look."""
        self._settle()
        if not (self._run / "ledger.jsonl").exists():
            return
        events = read_ledger(self._run)
        report = check_ledger(events)
        starts = lost_samples(events)
        lost, self._starts = sum(starts[self._starts :]), len(starts)
        about = (self._pending or [outcome for outcome in self.outcomes if outcome.fired] or self.outcomes)[-1]
        fresh = [problem for problem in report.problems if problem not in self._known]
        self._known += fresh
        about.lost += lost
        about.wrong += [f"samples were lost: {lost}"] * (lost > 0) + fresh
        about.recovered = about.recovered and not about.wrong

    def _damaged(self, outcome: Outcome) -> None:
        """Do it to the folder, start, undo it where the start refused."""
        fault, kind = outcome.fault, KINDS[outcome.fault.kind]
        undo, found = damage(fault, self._run, self._ground.prefixes, self._filler)
        if fault.kind.endswith(("-checkpoint", "-data")) and not found:
            outcome.wrong.append("nothing was found wrong by reading everything")
        outcome.fired = True
        self._marks.fired(fault.number).write_text(str(time.time()))
        said_before = self._said()
        began = time.time()
        statuses = self._launch([], *self._until(2)).wait(seconds=LIMIT, grace=GRACE)
        ended = time.time()
        said = self._said()[len(said_before) :]
        undo()
        if fault.kind == "flip-data" and not any(statuses):
            # a checkpoint of that start may hold the digest of samples further on, as they were while damaged
            self._start([], "--override-data")
        outcome.refused = kind.ending == "refuses" and any(statuses)
        if outcome.refused:
            outcome.seconds = ended - began
        if kind.ending == "goes on" or fault.kind == "flip-data":  # what is not read next stops nobody
            outcome.recovered = statuses.count(0) == len(statuses)
        if not outcome.refused and not outcome.recovered:
            outcome.wrong.append(f"the start ended with {statuses}: {said[-1500:]}")
        if kind.reason not in said and not (fault.kind == "flip-data" and outcome.recovered):
            outcome.wrong.append(f"{kind.reason!r} was not said: {said[-1500:]}")
        if outcome.recovered and (stepped := self._marks.stepped(self._marks.num_fired)).exists():
            outcome.seconds = float(stepped.read_text().split()[0]) - began
        outcome.recovered = outcome.recovered and not outcome.wrong
        self._judge_starts()

    def _two_runs(self, outcome: Outcome) -> None:
        """Start a second one while the first is in a step."""
        first = self._launch([outcome], *self._until(4))
        self._wait_for(self._marks.fired(outcome.fault.number), first)
        outcome.fired, began = True, time.time()
        other = self._out.with_name("second")
        statuses = self._launch([], *self._until(4), out=other).wait(seconds=LIMIT, grace=GRACE)
        outcome.seconds = time.time() - began
        self._marks.go().touch()
        own = first.wait(seconds=LIMIT, grace=GRACE)
        self._marks.go().unlink()
        said = other.read_text(errors="replace")
        outcome.refused = 0 not in statuses and KINDS["two-runs"].reason in said
        outcome.recovered = not any(own) and outcome.refused
        if not outcome.recovered:
            outcome.wrong.append(f"the second ended with {statuses}, the first with {own}: {said[-1500:]}")
        self._judge_starts()

    def _find_hung(self, outcome: Outcome, running: Running) -> None:
        """The doctor names the rank that is stopped; once the others have given up, it is killed."""
        fired = self._marks.fired(outcome.fault.number)
        self._wait_for(fired, running)
        pid, told = int(fired.read_text().split()[1]), ""
        name, deadline = f"rank {outcome.fault.rank} ", time.monotonic() + GRACE
        while name not in told.replace(":", " ") and time.monotonic() < deadline and not running.is_over():
            time.sleep(0.5)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                status = doctor.examine(self._run)
            told = "\n".join(printed.getvalue().splitlines()[1:]) if status == 1 else ""
        if not told.startswith(name.rstrip()):
            outcome.wrong.append(f"the doctor did not name rank {outcome.fault.rank}: {printed.getvalue()}")
        deadline = time.monotonic() + 2 * GRACE
        while "is gone, stuck or late" not in self._said() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)

    def _wait_for(self, path: Path, running: Running) -> None:
        deadline = time.monotonic() + LIMIT
        while not path.exists():
            if running.is_over() or time.monotonic() > deadline:
                raise RuntimeError(f"{path.name} did not come: {self._said()[-1500:]}")
            time.sleep(0.02)

    def _compare(self) -> None:
        """The end: nothing is pending, and every byte is that of the run that nothing befell."""
        for outcome in self._pending:
            outcome.wrong.append("no step was taken after it")
        folder = find_checkpoint(self._run)
        problems = []
        if any(outcome.fault.kind in BAD_NUMBERS for outcome in self.outcomes):
            reader = CheckpointReader(folder)
            problems += [f"{name} is not finite" for name in reader.tensors if not reader.read(name).isfinite().all()]
            skipped = check_ledger(read_ledger(self._run)).skipped
            count = sum(stop - start for start, stop in skipped)
            wanted = BATCH * sum(outcome.fault.kind in BAD_NUMBERS for outcome in self.outcomes)
            problems += [f"samples {skipped} were skipped, expected {wanted} of them"] * (count != wanted)
        else:
            step = step_of(folder)
            assert step is not None, folder
            if tensor_files(folder) != self._ground.expected(self._layout, step):
                problems.append(f"{folder.name} is not that of the run without faults")
        for outcome in self.outcomes if problems else ():
            outcome.wrong += problems
            outcome.recovered = False


def policy(outcome: Outcome) -> str | None:
    """What the run is to do with the bad numbers that befall it, if any do."""
    return outcome.fault.kind.partition("-")[2] if outcome.fault.kind in BAD_NUMBERS else None


def lost_samples(events: Sequence[Event]) -> list[int]:
    """Of each start, by how many samples it began before the last good checkpoint that there was."""
    lost, saved, bad = [], [], set()
    for event in events:
        if event["event"] == "checkpoint":
            saved = [one for one in saved if one["step"] < event["step"]] + [event]
            bad.discard(event["name"])
        elif event["event"] == "fallback":
            bad.add(event["bad"])
        elif event["event"] == "start":
            good = max((one["samples"] for one in saved if one["name"] not in bad), default=0)
            lost.append(max(0, good - event["samples"]))
    return lost
