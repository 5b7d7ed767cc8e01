"""A run from its settings to its last checkpoint: what is found, built, loaded, in this order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.checkpoint.folders import MANIFEST
from megatron_aquila.config.cli import LoadedConfig
from megatron_aquila.config.derive import Derived
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.verify import without_manifest
from megatron_aquila.observe.breadcrumbs import Recorder
from megatron_aquila.observe.log import Log
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.banner import print_banner, print_kernels
from megatron_aquila.train.build import Machine, build_machine, create_context
from megatron_aquila.train.corpus import Corpus, build_corpus, identify
from megatron_aquila.train.ephemeral import any_parts, find_parts
from megatron_aquila.train.launcher import Launch
from megatron_aquila.train.presence import presence
from megatron_aquila.train.record import named, start_event, unrecorded, without_rewound
from megatron_aquila.train.report import open_reporter
from megatron_aquila.train.resume import check_published, load_weights
from megatron_aquila.train.start import Start, checkpoint_name, find_start, resolve_checkpoint
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.stops import StopRequest
from megatron_aquila.train.trainer import train
from megatron_aquila.train.upcoming import check_upcoming


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that is ready for its next step. ``corpus`` is to be closed.

    ``passed_over``: names of damaged checkpoints before the one it starts from, and what is wrong with each.
    """

    machine: Machine
    corpus: Corpus
    start: Start
    passed_over: Sequence[tuple[str, str]] = ()

    @property
    def came_from(self) -> Path | None:
        """The checkpoint that all tensors are of, and that the run continues."""
        if self.start.is_part:
            return durable_before(self.machine.config, self.start.state)
        return self.start.checkpoint if self.start.with_optimizer else None


def prepare(config: RunConfig, derived: Derived, ctx: ParallelContext, launch: Launch, log: Log) -> Prepared:
    """Find where the run starts, build it, open its data and load it. Collective.

    What is cheap to find wrong, a file that is not there or is of another model, is found before anything is built.
    What fails on one rank fails on all, with one text.
    """
    bad: list[tuple[str, str]] = []

    def durable() -> Start:
        checkpoint = resolve_checkpoint(
            config.checkpoint, ctx.world, log.line, lambda folder, reason: bad.append((checkpoint_name(folder), reason))
        )
        start = begin(checkpoint)
        agreed(lambda: check_published(config, derived.shape, start) if ctx.rank == 0 else None, ctx.world)
        return start

    def begin(checkpoint: Path | None, *, is_part: bool = False) -> Start:
        return agreed(lambda: find_start(config, derived, checkpoint, identity, is_part=is_part), ctx.world)

    identity = agreed(lambda: identify(config) if ctx.rank == 0 else None, ctx.world)
    # What a rank owns, and so whether a part on its disk is whole, is known once the machine is built.
    start = None if any_parts(config.checkpoint, ctx) else durable()
    machine = build_machine(config, derived, ctx)
    print_kernels(log, config, machine.kernels.reasons)
    if start is None:
        part = find_parts(machine, log.line)
        start = durable() if part is None else begin(part, is_part=True)
    start = without_rewound(start, config, ctx)
    segments = start.state.index_segments
    corpus = build_corpus(config, derived, ctx, launch, segments=segments, identity=identity)
    log.line(corpus.train.source.describe())
    log.line(corpus.course)
    if (line := without_manifest(corpus.source_names)) is not None:
        log.line(line)
    log.line(begins(config, start))
    if (line := agreed(lambda: compare_upcoming(config, start, corpus, ctx), ctx.world)) is not None:
        log.line(line)
    for line in load_weights(machine, start):
        log.line(line)
    return Prepared(machine=machine, corpus=corpus, start=start, passed_over=bad)


def pretrain(
    loaded: LoadedConfig,
    derived: Derived,
    device: torch.device,
    launch: Launch,
    log: Log,
    *,
    attempt: str,
    stops: StopRequest,
) -> TrainState:
    """Hold the run's folder and train to its end. Collective. ``attempt`` tells this start from a launcher's others."""
    recorder = Recorder(rank=launch.rank, world=launch.world_size, attempt=attempt)
    ctx = create_context(loaded.config, derived, device, recorder)
    with presence(loaded.config, ctx, launch, recorder, stops, log):
        return train_in_folder(loaded, derived, ctx, launch, log, stops)


def train_in_folder(
    loaded: LoadedConfig, derived: Derived, ctx: ParallelContext, launch: Launch, log: Log, stops: StopRequest
) -> TrainState:
    """Train to the end of the run. Collective. What fails on one rank before training fails on all, with one text."""
    config = loaded.config
    print_banner(log, loaded, derived)
    run = prepare(config, derived, ctx, launch, log)
    state = named(run.start.state, config, ctx)
    try:
        with open_reporter(run.machine, log) as reporter:
            missing = agreed(lambda: unrecorded(config, run.start) if ctx.rank == 0 else None, ctx.world)
            if ctx.rank == 0:
                if missing is not None:
                    reporter.record("checkpoint", **missing)
                for bad, reason in run.passed_over:
                    chosen = None if run.start.checkpoint is None else checkpoint_name(run.start.checkpoint)
                    reporter.record("fallback", bad=bad, checkpoint=chosen, reason=reason)
                reporter.record("start", **start_event(config, ctx, run.start, state, run.corpus.identity))
            return train(run.machine, run.corpus, state, reporter, stops, came_from=run.came_from)
    finally:
        run.corpus.close()


def compare_upcoming(config: RunConfig, start: Start, corpus: Corpus, ctx: ParallelContext) -> str | None:
    """Rank 0 holds the samples that come next against the checkpoint's digest of them; what it found, in a line.

    Raises ``CheckpointError`` where they differ.
    """
    saved = start.state.upcoming
    if ctx.rank != 0 or saved is None or not start.with_optimizer:
        return None
    return check_upcoming(saved, corpus.train.source, override=config.checkpoint.override_data)


def durable_before(config: RunConfig, state: TrainState) -> Path | None:
    """The checkpoint of the run's own folder that an ephemeral one follows, if it lies there: to go back to."""
    save = config.checkpoint.save
    if save is None or state.parent is None or not (save / state.parent / MANIFEST).is_file():
        return None
    return save / state.parent


def begins(config: RunConfig, start: Start) -> str:
    """Where the run starts, in a line."""
    state, checkpoint = start.state, start.checkpoint
    stands = f"at step {state.step}, {state.consumed_samples} samples"
    if start.is_part:
        return f"resumes from the ephemeral {checkpoint}, each rank from its own part, {stands}"
    if checkpoint is not None:
        return f"{'resumes' if start.with_optimizer else 'starts a new run'} from {checkpoint} {stands}"
    own = f"{config.checkpoint.save} holds no checkpoint yet: " if config.checkpoint.resumes_own else ""
    return f"{own}starts afresh from the seed or published weights {stands}"
