"""What a run puts into its folder before it writes anything else: its lock, its breadcrumbs, its watch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import RunFolderError
from megatron_aquila.observe.breadcrumbs import Recorder
from megatron_aquila.observe.log import Log
from megatron_aquila.observe.watch import watched
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.launcher import Launch
from megatron_aquila.train.lock import take_lock
from megatron_aquila.train.report import log_folder
from megatron_aquila.train.stops import StopRequest


@contextmanager
def presence(
    config: RunConfig, ctx: ParallelContext, launch: Launch, recorder: Recorder, stops: StopRequest, log: Log
) -> Iterator[None]:
    """Hold the run's folder for the body's length. Collective.

    Rank 0 holds the lock, looks for the stop file, and fails once the lock is lost. Raises ``AquilaError`` on every
    rank where another run has the folder; without a folder there is nothing to hold.
    """
    folder = config.checkpoint.save if config.checkpoint.save is not None else config.observe.log_dir
    stop_file = config.train.stop_file
    if stop_file is None and folder is not None:
        stop_file = folder / "stop"
    with ExitStack() as held:
        agreed(lambda: held.enter_context(_locked(folder, ctx, launch, stops, log)), ctx.world)
        agreed(lambda: held.enter_context(_trail(config, recorder)), ctx.world)
        stops.limit(minutes=config.train.exit_minutes, file=stop_file if ctx.rank == 0 else None)
        yield
        recorder.close()


def trail_folder(config: RunConfig) -> Path | None:
    """The folder of the run in which every rank leaves its trail, if it is to."""
    return log_folder(config) if config.observe.breadcrumbs else None


@contextmanager
def _locked(folder: Path | None, ctx: ParallelContext, launch: Launch, stops: StopRequest, log: Log) -> Iterator[None]:
    if folder is None or ctx.rank != 0:
        yield
        return
    lock, line = take_lock(folder, run_id=launch.run_id)
    stops.check = lock.check
    if line is not None:
        log.line(line)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _trail(config: RunConfig, recorder: Recorder) -> Iterator[None]:
    """Keep the breadcrumbs in the log's folder, and a watch over them."""
    run = trail_folder(config)
    if run is None:
        yield
        return
    try:
        recorder.keep_in(run)
    except OSError as error:
        way_out = "name a folder that can be written, or give --no-breadcrumbs"
        raise RunFolderError(f"{run}: no breadcrumbs can be kept: {error.strerror}; {way_out}") from error
    with watched(recorder, run, seconds=config.observe.hang_dump_seconds):
        yield
