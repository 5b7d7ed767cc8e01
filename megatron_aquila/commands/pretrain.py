"""``aquila pretrain``: parse, build, run."""

import sys
from collections.abc import Sequence
from datetime import timedelta

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import LoadedConfig, load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.train.launcher import Launch, read_launch


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain as the settings say; under torchrun one process a rank. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    launch = read_launch()
    with exit_code(rank=launch.rank) as code:
        run(load_config(arguments, world_size=launch.world_size, prog="aquila pretrain", to_train=True), launch)
    return code.value


def run(loaded: LoadedConfig, launch: Launch) -> None:
    """Build the run and train to its end."""
    # Torch is imported here, so that --help and wrong flags answer at once.
    from megatron_aquila.observe.log import Log
    from megatron_aquila.train import banner, env, run

    config = loaded.config
    derived = derive(config, launch.world_size)
    env.prepare_environment()
    device = env.choose_device(config.train.device, launch)
    banner.check_memory(config, derived, device)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    with env.process_group(device, launch, timeout), banner.explain_out_of_memory(config, derived):
        run.pretrain(loaded, derived, device, launch, Log(enabled=launch.rank == 0))
