"""The loop: steps, validations, checkpoints, and the four ways it ends (samples, time, signal, end of the run)."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.checkpoint.folders import step_folder
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import AquilaError, CommunicationError, ReplicaError, RunFolderError
from megatron_aquila.observe.report import StepReport
from megatron_aquila.parallel.sanity import check_replicated
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.evaluate import evaluate
from megatron_aquila.train.faults import Fault, Judge, Rewinder, stopped
from megatron_aquila.train.garbage import Garbage
from megatron_aquila.train.loss import LossMeans
from megatron_aquila.train.profile import StepProfiler
from megatron_aquila.train.record import RunRecord
from megatron_aquila.train.releases import Releases
from megatron_aquila.train.saving import Saver
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.step import Step, train_step
from megatron_aquila.train.stops import StopRequest
from megatron_aquila.train.stragglers import Comparison, Stragglers


class Reporter(Protocol):
    """Who is told what happened; rank 0 writes it down, the others ignore it."""

    def step(self, report: StepReport) -> None:
        """One optimizer step is done."""

    def validation(self, state: TrainState, means: LossMeans) -> None:
        """A validation is done."""

    def stall(self, state: TrainState, seconds: float) -> None:
        """Training stood still for ``seconds`` while a checkpoint was begun."""

    def stragglers(self, state: TrainState, found: Comparison) -> None:
        """The ranks' own times were compared."""

    def note(self, text: str | None) -> None:
        """Something else worth a line; ``None`` is not."""

    def record(self, event: str, **fields: Any) -> None:
        """An event for the run's ledger (``observe.ledger``)."""


class Steps:
    """Takes steps, and tells of each once its figures are here.

    On a GPU that is one step late, so that the device has work while the host reads, writes the log and prepares the
    next step; a CPU has the figures at once. A dynamic loss scale has to wait for them: the next step's loss is
    multiplied with what follows from this one. On which device the run is decides, never which figures happen to be
    here, so that all ranks tell of a step, and find a run that is lost, at the same place. Nothing is communicated.
    """

    def __init__(self, machine: Machine, corpus: Corpus, reporter: Reporter, record: RunRecord) -> None:
        self._machine, self._corpus, self._reporter, self._record = machine, corpus, reporter, record
        self._judge = Judge(machine.config.train, machine.scaling)
        self._runs_ahead = runs_ahead(machine)
        self._under_way: Step | None = None
        self.fault: Fault | None = None  # of a step that was told of, where the run must not just go on

    def take(self, state: TrainState, *, stop_requested: bool) -> Step | None:
        """Launch the step after ``state`` and settle the one before it; go on from its ``state``. Collective.

        None where the ranks agreed to stop instead.
        """
        try:
            step = train_step(self._machine, self._corpus, state, stop_requested=stop_requested)
        except AquilaError:  # raised on every rank, before the step began
            self.settle(state)
            raise
        if step is None:
            return None
        self._record.took(step.samples)
        state = self.settle(step.state)
        self._under_way = step
        return replace(step, state=state if self._runs_ahead else self.settle(state))

    def settle(self, state: TrainState) -> TrainState:
        """``state`` with all steps settled and told of. Waits for the step under way, if there is one.

        Raises ``AquilaError`` where the run is lost.
        """
        step, self._under_way = self._under_way, None
        if step is None:
            return state
        outcome = step.outcome(state, self._machine.scaling)
        start, stop = step.samples
        if outcome.report is None:
            self._reporter.note(f"samples {start}-{stop - 1}: none is trained on")
            return outcome.state
        self._reporter.step(outcome.report)
        fault = self._judge.fault(step, outcome)
        if fault is not None:
            self._reporter.note(fault.reason)
        if not outcome.report.applied:
            reason = "the loss scale was too high" if fault is None else fault.reason
            self._record.skipped(outcome.report.step, step.samples, reason)
        if fault is not None and fault.policy in ("stop", "rewind"):
            self.fault = fault
        return outcome.state

    def forget(self) -> None:
        """Tell nothing of the step under way: the run goes back to before it."""
        self._under_way = self.fault = None


def runs_ahead(machine: Machine) -> bool:
    """Whether the next step may be launched before it is known what became of this one."""
    return machine.ctx.device.type == "cuda" and machine.scaling.is_constant


class Loop:
    """A run under way; ``state`` is what its steps so far have come to."""

    def __init__(
        self,
        machine: Machine,
        corpus: Corpus,
        state: TrainState,
        reporter: Reporter,
        stops: StopRequest,
        came_from: Path | None,
    ) -> None:
        self._machine, self._corpus, self._reporter, self.state = machine, corpus, reporter, state
        self._stops = stops
        self.record = RunRecord(reporter, corpus.train.source, state.taken)
        self.last_saved = -1 if state.taken else state.step  # what was taken is in no durable checkpoint yet
        self._alike_at = state.step
        self._steps = Steps(machine, corpus, reporter, self.record)
        self._rewinder = Rewinder(machine, corpus, came_from, state.skipped_samples)
        self._saver = Saver(machine, corpus.identity, reporter, self._saved)
        self._releases = Releases(machine.config, machine.ctx.rank, reporter)
        self._profiler = StepProfiler(machine.config, machine.ctx.rank, machine.ctx.device)
        self._stragglers = Stragglers(machine.ctx, interval=machine.config.observe.straggler_interval)
        self._garbage = Garbage(interval=machine.config.train.gc_interval)

    def run(self) -> str:
        """Take steps until the run ends; why it does. Collective. Raises ``AquilaError`` where it is lost."""
        self._stops.begin()
        with closing(self._profiler), closing(self._releases), closing(self._garbage):
            self._releases.begin()
            self._saver.prepare(self.state)
            self._garbage.begin()
            why = end_of_run(self._machine.config, self.state)
            try:
                if why is not None and self.last_saved < 0:
                    self._save()  # the run begins at its end, which is in no durable checkpoint
                while why is None:
                    why = self._step()
                    self._garbage.after(self.state.step)
            except (CommunicationError, RunFolderError):
                raise  # not every rank is here, or the folder is another run's
            except ReplicaError:  # raised on every rank: what is being saved, or is only here, may hold the error
                self._saver.forget_ephemerals()
                raise
            except AquilaError:  # raised on every rank: what was begun before is good
                self._saver.finish()
                raise
            self._saver.finish()
            self._machine.optimizer.settle()
            self._releases.wait(lambda: self._stops.is_asked)
            self._stops.honour()  # what asked for a stop at the end has served, too
        return why

    @property
    def stopped_for(self) -> Fault | None:
        """The bad numbers for which the run stopped, if any."""
        return self._steps.fault

    def _step(self) -> str | None:
        """One step and what is due after it, or back to a checkpoint; why the run ends here, if it does."""
        self._profiler.before(self.state.step + 1)
        self._machine.ctx.trail.at(self.state.step + 1, "train")
        step = self._take()
        if step is None:
            return self._stop()
        self.state = step.state
        if (comparison := self._stragglers.after(self.state.step)) is not None:
            self._reporter.stragglers(self.state, comparison)
        why = end_of_run(self._machine.config, self.state)
        if why is not None or self._is_anything_due():
            self.state = self._steps.settle(self.state)
        fault = self._steps.fault
        if fault is not None and fault.policy == "rewind":
            self._go_back(fault)
            return None
        if fault is not None:
            self.state = self._steps.settle(self.state)
            why = fault.reason
        self._after_step(last=why is not None)
        return why

    def _take(self) -> Step | None:
        """Launch a step; None where the ranks agreed to stop instead."""
        with self._stragglers.measure():
            return self._steps.take(self.state, stop_requested=self._stops.is_asked)

    def _stop(self) -> str:
        """Save what is not saved yet, as the run was asked to stop before its next step; why it was."""
        self.state = self._steps.settle(self.state)
        self._reporter.note(self._profiler.after(self.state.step, last=True))
        if self._machine.config.checkpoint.save is not None:
            self._save()
            self._saver.finish()  # a stop file is not honoured before
        self._releases.close()
        reason = self._stops.reason
        self._stops.honour()
        fault = self._steps.fault
        if fault is not None and fault.policy == "rewind":
            self._steps.forget()  # its update was left out, and that is saved
        return reason

    def _is_anything_due(self) -> bool:
        return self._checks() or self._validates(last=False) or self._saves(last=False) or self._saves_here()

    def _checks(self) -> bool:
        return is_due(self.state.step, self._machine.config.train.check_replicas, last=False)

    def _validates(self, *, last: bool) -> bool:
        return bool(self._corpus.valid) and is_due(self.state.step, self._machine.config.train.eval_interval, last=last)

    def _saves(self, *, last: bool) -> bool:
        config = self._machine.config
        interval = save_interval(config, self.state)
        return config.checkpoint.save is not None and is_due(self.state.step, interval, last=last)

    def _saves_here(self) -> bool:
        """Whether an ephemeral checkpoint is due."""
        interval = self._machine.config.checkpoint.ephemeral_save_interval
        return interval is not None and is_due(self.state.step, interval, last=False)

    def _after_step(self, *, last: bool) -> None:
        machine, reporter, trail = self._machine, self._reporter, self._machine.ctx.trail
        reporter.note(self._profiler.after(self.state.step, last=last))
        if self._checks():
            trail.at(self.state.step, "check")
            not_masters, wait = machine.optimizer.not_masters(), machine.optimizer.wait_for_weights
            check_replicated(
                machine.infos,
                machine.ctx,
                not_masters=not_masters,
                alike_at=self._alike_at,
                read=lambda param: wait([param]),
            )
            self._alike_at = self.state.step
        if self._validates(last=last):
            trail.at(self.state.step, "validate")
            means = evaluate(machine, self._corpus, self._stops)
            if means is not None:
                reporter.validation(self.state, means)
        if self._saves(last=last):
            self._save()
        else:
            self._saver.poll()
            if self._saves_here():
                trail.at(self.state.step, "save")
                state = agreed(lambda: self.record.as_it_is(self.state), machine.ctx.host_world)
                self._saver.begin_ephemeral(state)
        self._releases.poll()

    def _save(self) -> None:
        """Begin a checkpoint of the run as it is now, unless there is one."""
        if self.last_saved == self.state.step:
            return
        self._machine.ctx.trail.at(self.state.step, "save")
        self.state = agreed(lambda: self.record.to_be_saved(self.state), self._machine.ctx.host_world)
        self._saver.begin(self.state)
        name, digest = step_folder(Path(), self.state.step).name, self.state.digest
        self.state = replace(self.state, parent=name, parent_digest=digest)
        self.last_saved = self.state.step

    def _saved(self, folder: Path) -> None:
        """A checkpoint is whole on the disk."""
        self.record.saved(folder)
        self._rewinder.saved(folder)
        self._releases.saved(folder)

    def _go_back(self, fault: Fault) -> None:
        """To the last checkpoint, which may be one that is just being written. Collective."""
        self._saver.finish()

        def decided(checkpoint: Path) -> None:
            agreed(lambda: self.record.rewound(self.state, checkpoint, fault), self._machine.ctx.world)
            self._saver.forget_ephemerals()  # not before: where the run cannot go back, they are its newest work

        state = self._rewinder.back(fault, decided)
        self._steps.forget()
        start, stop = fault.samples
        self._reporter.note(f"back to {state.parent}, step {state.step}, without samples {start}-{stop - 1}")
        self.state = state
        self._alike_at = state.step


def train(
    machine: Machine,
    corpus: Corpus,
    state: TrainState,
    reporter: Reporter,
    stops: StopRequest,
    *,
    came_from: Path | None = None,
) -> TrainState:
    """Run from ``state`` to the end of the run, or until asked to stop. Collective; returns the last state.

    Stopping is agreed before each step, takes effect there, and saves what is not saved yet. ``came_from`` is the
    checkpoint that ``state`` and all tensors are of, to which the run may go back. Raises ``AquilaError``
    where the run is lost, or, once it is saved, where it stops for bad numbers.
    """
    corpus.train.leave_out(state.skipped_samples, seq_len=machine.derived.shape.seq_len)
    loop = Loop(machine, corpus, state, reporter, stops, came_from)
    try:
        why = loop.run()
    except BaseException as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        loop.record.stopped(loop.state, reason, failed=True)
        raise
    fault, state = loop.stopped_for, loop.state
    loop.record.stopped(state, why, failed=False)
    reporter.note(f"stopped at step {state.step}, {state.consumed_samples} samples: {why}")
    if loop.last_saved < state.step:
        reporter.note("nothing was saved since: no --save folder is set")
    if fault is not None:
        raise stopped(fault)
    return state


def end_of_run(config: RunConfig, state: TrainState) -> str | None:
    """Why no further step is due, or ``None``."""
    if state.consumed_samples >= config.train.train_samples:
        return f"--train-samples {config.train.train_samples} are consumed"
    if config.train.exit_samples is not None and state.consumed_samples >= config.train.exit_samples:
        return f"--exit-samples {config.train.exit_samples} are consumed"
    return None


def is_due(step: int, interval: int, *, last: bool) -> bool:
    """Whether something that happens every ``interval`` steps, and at the end, happens after ``step``."""
    return interval > 0 and (last or step % interval == 0)


def save_interval(config: RunConfig, state: TrainState) -> int:
    """Steps between checkpoints at this point: during the batch ramp, which has many short steps, it may differ."""
    ramp, settings = config.train.rampup_batch, config.checkpoint
    if ramp is not None and settings.rampup_save_interval is not None and state.consumed_samples < ramp[2]:
        return settings.rampup_save_interval
    return settings.save_interval
