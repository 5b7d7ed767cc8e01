"""The loop: steps, validations, checkpoints, and the four ways it ends (samples, time, signal, end of the run)."""

import itertools
from contextlib import closing
from dataclasses import replace
from typing import Protocol

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import AquilaError
from megatron_aquila.observe.report import StepReport
from megatron_aquila.optim.scaler import LossScaling
from megatron_aquila.parallel.sanity import check_replicated
from megatron_aquila.train.build import Machine
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.evaluate import evaluate
from megatron_aquila.train.loss import LossMeans
from megatron_aquila.train.profile import StepProfiler
from megatron_aquila.train.resume import prune_old, save
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.step import Step, train_step
from megatron_aquila.train.stops import StopRequest
from megatron_aquila.train.stragglers import Comparison, Stragglers

MAX_SKIPPED_IN_A_ROW = 20


class Reporter(Protocol):
    """Who is told what happened; rank 0 writes it down, the others ignore it."""

    def step(self, report: StepReport) -> None:
        """One optimizer step is done."""

    def validation(self, state: TrainState, means: LossMeans) -> None:
        """A validation is done."""

    def stragglers(self, state: TrainState, found: Comparison) -> None:
        """The ranks' own times were compared."""

    def note(self, text: str | None) -> None:
        """Something else worth a line; ``None`` is not."""


class Steps:
    """Takes steps, and tells of each once its figures are here.

    On a GPU that is one step late, so that the device has work while the host reads, writes the log and prepares the
    next step; a CPU has the figures at once. A dynamic loss scale has to wait for them: the next step's loss is
    multiplied with what follows from this one. On which device the run is decides, never which figures happen to be
    here, so that all ranks tell of a step, and find a run that is lost, at the same place. Nothing is communicated.
    """

    def __init__(self, machine: Machine, corpus: Corpus, reporter: Reporter) -> None:
        self._machine, self._corpus, self._reporter = machine, corpus, reporter
        self._runs_ahead = runs_ahead(machine)
        self._under_way: Step | None = None

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
        self._reporter.step(outcome.report)
        check_progress(outcome.state, outcome.report, self._machine.scaling)
        return outcome.state


def runs_ahead(machine: Machine) -> bool:
    """Whether the next step may be launched before it is known what became of this one."""
    return machine.ctx.device.type == "cuda" and machine.scaling.is_constant


def train(machine: Machine, corpus: Corpus, state: TrainState, reporter: Reporter, stops: StopRequest) -> TrainState:
    """Run from ``state`` to the end of the run, or until asked to stop. Collective; returns the last state.

    Stopping is agreed before each step and takes effect there; it saves what is not saved yet.
    """
    config, ctx = machine.config, machine.ctx
    last_saved = state.step
    profiler = StepProfiler(config, ctx.rank, ctx.device)
    steps = Steps(machine, corpus, reporter)
    stragglers = Stragglers(ctx, interval=config.observe.straggler_interval)
    stops.begin()
    with closing(profiler):
        why = end_of_run(config, state)
        while why is None:
            profiler.before(state.step + 1)
            ctx.trail.at(state.step + 1, "train")
            with stragglers.measure():
                step = steps.take(state, stop_requested=stops.is_asked)
            stopped = step is None
            if step is None:
                why = stops.reason
            else:
                state = step.state
                why = end_of_run(config, state)
                if (comparison := stragglers.after(state.step)) is not None:
                    reporter.stragglers(state, comparison)
            last = why is not None
            checks = not stopped and is_due(state.step, config.train.check_replicas, last=False)
            validates = not stopped and bool(corpus.valid) and is_due(state.step, config.train.eval_interval, last=last)
            saves = config.checkpoint.save is not None and is_due(state.step, save_interval(config, state), last=last)
            if last or checks or validates or saves:
                state = steps.settle(state)
            reporter.note(profiler.after(state.step, last=last))
            if checks:
                ctx.trail.at(state.step, "check")
                machine.optimizer.wait_for_weights()
                check_replicated(machine.infos, ctx)
            if validates:
                ctx.trail.at(state.step, "validate")
                means = evaluate(machine, corpus, stops)
                if means is not None:
                    reporter.validation(state, means)
            if saves and last_saved < state.step:
                ctx.trail.at(state.step, "save")
                reporter.note(f"saved {save(machine, state, corpus.identity)}")
                reporter.note(prune_old(machine))
                last_saved = state.step
            if stopped:
                stops.honour()
    machine.optimizer.wait_for_weights()
    reporter.note(f"stopped at step {state.step}, {state.consumed_samples} samples: {why}")
    if last_saved < state.step:
        reporter.note("nothing was saved since: no --save folder is set")
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


def check_progress(state: TrainState, report: StepReport, scaling: LossScaling) -> None:
    """Raise ``AquilaError`` once ``MAX_SKIPPED_IN_A_ROW`` steps in a row were not applied: the run is lost.

    Not while they lower the loss scale, which may start far too high.
    """
    if report.applied or not scaling.is_lowest(state.loss_scale) or len(state.skipped_samples) < MAX_SKIPPED_IN_A_ROW:
        return
    recent = state.skipped_samples[-MAX_SKIPPED_IN_A_ROW:]
    in_a_row = all(before[1] == after[0] for before, after in itertools.pairwise(recent))
    if in_a_row:
        error = AquilaError(
            f"step {report.step}: the gradient norm was not finite for {MAX_SKIPPED_IN_A_ROW} steps, samples "
            f"{recent[0][0]} to {recent[-1][1]}; resume from an earlier checkpoint with a lower --lr"
        )
        error.is_shared = True
        raise error
