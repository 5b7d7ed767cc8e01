"""A run from its settings to its last checkpoint: what is found, built, loaded, in this order."""

import torch

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.config.cli import LoadedConfig
from megatron_aquila.config.derive import Derived
from megatron_aquila.data.verify import without_manifest
from megatron_aquila.observe.breadcrumbs import Recorder
from megatron_aquila.observe.log import Log
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.banner import print_banner
from megatron_aquila.train.build import build_machine, create_context
from megatron_aquila.train.corpus import build_corpus, identify
from megatron_aquila.train.launcher import Launch
from megatron_aquila.train.presence import presence
from megatron_aquila.train.report import open_reporter
from megatron_aquila.train.resume import load_weights
from megatron_aquila.train.start import find_start, resolve_checkpoint
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.stops import StopRequest
from megatron_aquila.train.trainer import train


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
    checkpoint = resolve_checkpoint(config.checkpoint, ctx.world)
    identity = agreed(lambda: identify(config) if ctx.rank == 0 else None, ctx.world)
    start = agreed(lambda: find_start(config, derived, checkpoint, identity), ctx.world)
    machine = build_machine(config, derived, ctx)
    print_banner(log, loaded, derived, machine.kernels.reasons)
    segments = start.state.index_segments
    corpus = build_corpus(config, derived, ctx, launch, segments=segments, identity=identity)
    log.line(corpus.train.source.describe())
    log.line(corpus.course)
    if (line := without_manifest(corpus.source_names)) is not None:
        log.line(line)
    log.line(begins(start.state, checkpoint))
    for line in load_weights(machine, start):
        log.line(line)
    try:
        with open_reporter(machine, log) as reporter:
            return train(machine, corpus, start.state, reporter, stops)
    finally:
        corpus.close()


def begins(state: TrainState, checkpoint: object) -> str:
    """Where the run starts, in a line."""
    origin = "the seed or published weights" if checkpoint is None else str(checkpoint)
    return f"starts from {origin} at step {state.step}, {state.consumed_samples} samples"
