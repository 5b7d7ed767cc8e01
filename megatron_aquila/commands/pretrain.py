"""``aquila pretrain``: parse, build, run."""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import LoadedConfig, load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.errors import ConfigError
from megatron_aquila.train.launcher import Launch, read_launch
from megatron_aquila.train.stops import StopRequest, stop_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain as the settings say; under torchrun one process a rank. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    launch = read_launch()
    with exit_code(rank=launch.rank) as code, stop_on_signals() as stops:
        run(load(arguments, launch), launch, stops)
    if code.value != 0 and launch.world_size > 1:
        leave(code.value)
    return code.value


def load(arguments: Sequence[str], launch: Launch) -> LoadedConfig:
    """The settings. Their problems are the same on every rank: one of them prints them."""
    try:
        return load_config(arguments, world_size=launch.world_size, prog="aquila pretrain", to_train=True)
    except ConfigError as error:
        error.is_shared = True
        raise


def leave(status: int) -> NoReturn:
    """End this process at once, what it printed written out.

    The process group's threads are still there, and a group whose other ranks may be gone is not taken down in order:
    the interpreter's own way out would abort the process, and the status would be lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(loaded: LoadedConfig, launch: Launch, stops: StopRequest) -> None:
    """Build the run and train to its end, or until ``stops`` asks."""
    # Torch is imported here, so that --help and wrong flags answer at once.
    from megatron_aquila.observe.breadcrumbs import FOLDER
    from megatron_aquila.observe.log import Log
    from megatron_aquila.train import banner, env, presence, run

    config = loaded.config
    derived = derive(config, launch.world_size)
    splits_layers = derived.grid.tp > 1 or derived.grid.cp > 1
    trail = presence.trail_folder(config)
    env.prepare_environment(
        in_launch_order=splits_layers and config.parallel.zero < 3, traces=None if trail is None else trail / FOLDER
    )
    backend = config.train.distributed_backend
    device = env.choose_device(config.train.device, launch, backend)
    banner.check_memory(config, derived, device, launch)
    banner.check_peak(config, device)
    banner.check_graph(config, device)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    log = Log(enabled=launch.rank == 0)
    with env.process_group(device, launch, timeout, backend) as attempt, banner.explain_out_of_memory(config, derived):
        run.pretrain(loaded, derived, device, launch, log, attempt=attempt, stops=stops)
