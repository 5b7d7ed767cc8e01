"""What the run tells: one rank turns reports into rows and hands them to the writers, the others stay silent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.config.derive import full_microbatches
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.sources import valid_sets
from megatron_aquila.errors import AquilaError
from megatron_aquila.observe.gemm import measure_gemm_flops
from megatron_aquila.observe.ledger import LEDGER_NAME, Ledger
from megatron_aquila.observe.log import Log
from megatron_aquila.observe.meters import ThroughputMeter
from megatron_aquila.observe.report import StepReport
from megatron_aquila.observe.writers import Writers, open_writers
from megatron_aquila.parallel.collectives import all_reduce_, gather_objects
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.flops import attention_flops, flops_per_token, peak_flops
from megatron_aquila.plan.recompute import recomputed_flops
from megatron_aquila.train.build import DTYPES, Machine
from megatron_aquila.train.loss import LossMeans
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.stragglers import Comparison


class RankZeroReporter:
    """Writes every ``log_interval``-th step, every validation and every note; on other ranks does nothing."""

    def __init__(
        self, *, log: Log, meter: ThroughputMeter, writers: Writers, log_interval: int, ledger: Ledger | None = None
    ) -> None:
        self._log, self._meter, self._writers, self._log_interval = log, meter, writers, log_interval
        self._ledger = ledger

    def step(self, report: StepReport) -> None:
        """Write the step's row; a step that was not applied is always written."""
        if report.step % self._log_interval == 0 or not report.applied:
            self._writers.write(self._meter.row(report))
        else:
            self._meter.pass_over(report)

    def validation(self, state: TrainState, means: LossMeans) -> None:
        """Write the validation's row, at the step it followed."""
        by_source = {f"valid_loss/{name}": loss for name, loss in means.by_source.items()}
        self._writers.write(
            {"step": state.step, "consumed_samples": state.consumed_samples, "valid_loss": means.loss, **by_source}
        )

    def stall(self, state: TrainState, seconds: float) -> None:
        """Write how long training stood still for a checkpoint, at the step it followed."""
        self._writers.write(
            {"step": state.step, "consumed_samples": state.consumed_samples, "save_stall_seconds": seconds}
        )

    def stragglers(self, state: TrainState, found: Comparison) -> None:
        """Write who was slowest; say so where that is more than chance."""
        row = {"slowest_rank": found.slowest_rank, "slowest_seconds": found.slowest_seconds}
        self._writers.write(
            {"step": state.step, "consumed_samples": state.consumed_samples, **row}
            | {"median_seconds": found.median_seconds, "slow_ranks": len(found.slow)}
        )
        if found.slow:
            self._log.line(str(found))

    def note(self, text: str | None) -> None:
        """Print a line; ``None`` is none."""
        if text is not None:
            self._log.line(text)

    def record(self, event: str, **fields: Any) -> None:
        """Write an event into the run's ledger, if it has a folder."""
        if self._ledger is not None:
            self._ledger.write(event, **fields)


@contextmanager
def open_reporter(machine: Machine, log: Log) -> Iterator[RankZeroReporter]:
    """The reporter for the length of a run. Collective: the GEMM rate of a CPU is measured on all ranks at once."""
    config, shape = machine.config, machine.derived.shape
    recomputed = recomputed_flops(
        shape,
        machine.derived.stages,
        machine.derived.recompute,
        full_microbatches(machine.derived),
    )
    meter = ThroughputMeter(
        flops_per_token=flops_per_token(shape),
        flops_per_token_full=flops_per_token(shape, "full"),
        attention_flops_per_token=shape.num_layers * attention_flops(shape.attention_size, shape.seq_len),
        recomputed_flops_per_token=recomputed.linears + recomputed.attention,
        recomputed_attention_flops_per_token=recomputed.attention,
        num_devices=machine.ctx.world.size,
        total_samples=config.train.train_samples,
        peak_flops=device_peak(config, machine.ctx.device, log, machine.ctx.world),
        multiplies_in_fp8=config.train.precision == "fp8",
        gemm_flops=cpu_rate(machine) if machine.ctx.device.type == "cpu" else None,
    )
    writers = agreed(
        lambda: rank_writers(config, log) if machine.ctx.rank == 0 else Writers([], log), machine.ctx.world
    )
    ledger = agreed(lambda: open_ledger(config, log) if machine.ctx.rank == 0 else None, machine.ctx.world)
    try:
        yield RankZeroReporter(
            log=log, meter=meter, writers=writers, log_interval=config.observe.log_interval, ledger=ledger
        )
    finally:
        writers.close()
        if ledger is not None:
            ledger.close()


def open_ledger(config: RunConfig, log: Log) -> Ledger | None:
    """The ledger in the run's folder. Raises ``AquilaError`` where it cannot be written."""
    folder = ledger_folder(config)
    try:
        return None if folder is None else Ledger(folder / LEDGER_NAME, complain=log.line)
    except OSError as error:
        raise AquilaError(f"--save or --log-dir: {error.filename}: {error.strerror}; name a writable folder") from error


def rank_writers(config: RunConfig, log: Log) -> Writers:
    """The writers that the settings ask for. Raises ``AquilaError`` naming the folder that cannot be written."""
    observe = config.observe
    project = observe.wandb_project
    if project is None and observe.wandb_dir is not None:
        project = "megatron_aquila"  # FlagScale's scripts turn W&B on by naming its folder
    try:
        return open_writers(
            log,
            total_samples=config.train.train_samples,
            valid_sets=tuple(valid_sets(config.data)),
            log_dir=log_folder(config),
            tensorboard_dir=observe.tensorboard_dir,
            wandb_project=project,
            wandb_name=observe.wandb_exp_name,
            wandb_dir=observe.wandb_dir if observe.wandb_dir is not None else Path("wandb"),
        )
    except OSError as error:
        raise AquilaError(
            f"--log-dir, --save or --tensorboard-dir: {error.filename}: {error.strerror}; name writable folders"
        ) from error


def log_folder(config: RunConfig) -> Path | None:
    """The folder of the run's log and profiles: as set, or that of the checkpoints."""
    return config.observe.log_dir if config.observe.log_dir is not None else config.checkpoint.save


def ledger_folder(config: RunConfig) -> Path | None:
    """The folder of the run's ledger: that of the checkpoints, or the log's."""
    return config.checkpoint.save if config.checkpoint.save is not None else config.observe.log_dir


def device_peak(config: RunConfig, device: torch.device, log: Log, world: Group) -> float | None:
    """Dense peak of a device in FLOP/s for the MFU: as set, or from the devices' names, or unknown and said so.

    Of devices that differ the mean, so that the MFU is that of all of them. Two all-gathers over the world.
    """
    if config.observe.peak_tflops is not None:
        return config.observe.peak_tflops * 1e12
    if device.type == "cpu":
        return None
    names = gather_objects(torch.cuda.get_device_name(device), world)
    peaks = {name: peak_flops(name, config.train.precision) for name in names}
    known = [peak for peak in map(peaks.get, names) if peak is not None]
    if len(known) < len(names):
        unknown = ", ".join(name for name, peak in peaks.items() if peak is None)
        log.line(
            f"no peak is known for {unknown} in {config.train.precision}: no MFU is printed; --peak-tflops sets one"
        )
        return None
    return sum(known) / len(known)


def cpu_rate(machine: Machine) -> float:
    """FLOP/s of a large fp32 matmul on one rank while all ranks of this machine run theirs: the mean over ranks."""
    rate = measure_gemm_flops(machine.ctx.device, DTYPES["fp32"])
    total = all_reduce_(torch.tensor(rate, dtype=torch.float64), machine.ctx.world)
    return float(total) / machine.ctx.world.size
