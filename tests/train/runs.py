"""Whole runs inside the pool's workers: everything of ``aquila pretrain`` but torchrun."""

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.config.derive import derive
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.saving import CheckpointConfig
from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.observe import breadcrumbs
from megatron_aquila.observe.report import StepReport
from megatron_aquila.train import build, corpus, ephemeral, resume, start, trainer
from megatron_aquila.train.env import choose_device
from megatron_aquila.train.launcher import Launch, read_launch
from megatron_aquila.train.loss import LossMeans
from megatron_aquila.train.run import durable_before
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.stops import stop_on_signals
from megatron_aquila.train.stragglers import Comparison

VOCAB_SIZE = 61


def write_corpus(folder: Path, *, documents: int = 60) -> tuple[str, ...]:
    """Two small data sets of counting sequences, as a weighted ``data.path``."""
    generator = np.random.default_rng(0)
    for name, stride in (("threes", 3), ("fives", 5)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for _ in range(documents):
                start, length = generator.integers(VOCAB_SIZE), generator.integers(10, 60)
                writer.add_sequence((start + stride * np.arange(length)) % VOCAB_SIZE)
                writer.end_document()
    return ("0.7", str(folder / "threes"), "0.3", str(folder / "fives"))


def tiny_config(folder: Path, **train: Any) -> RunConfig:
    """A run of six steps, in float64 unless ``train`` says otherwise, on the corpus in ``folder``."""
    settings = {"train_samples": 48, "micro_batch": 2, "global_batch": 8, "eval_interval": 3, "eval_iters": 1}
    settings |= {"precision": "fp64", "device": "cpu"} | train
    return RunConfig(
        model=ModelConfig(
            num_layers=3,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_size=48,
            vocab_size=VOCAB_SIZE,
            vocab_multiple=8,
            seq_len=16,
            init_std=0.2,
        ),
        data=DataConfig(path=write_corpus(folder), split="90,10,0", cache_path=folder / "cache", prefetch=1),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, lr_warmup_samples=8),
        train=TrainConfig(**settings),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(save=folder / "run", save_interval=2),
    )


def split(config: RunConfig, *, tp: int = 1, pp: int = 1, **parallel: Any) -> RunConfig:
    """``config`` on another layout; dp is what the world leaves."""
    return replace(config, parallel=ParallelConfig(**{"tensor": tp, "pipeline": pp, "bucket_mib": 1} | parallel))


@dataclass
class Recorder:
    """A reporter that keeps what it is told."""

    reports: list[StepReport] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    means: list[LossMeans] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stalls: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    kill_at: int | None = None

    def step(self, report: StepReport) -> None:
        """Keep the report; at ``kill_at`` rank 0 is sent SIGTERM."""
        self.reports.append(report)
        if self.kill_at == report.step and int(os.environ.get("RANK", "0")) == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def validation(self, state: TrainState, means: LossMeans) -> None:
        """Keep step and loss."""
        self.validations.append((state.step, means.loss))
        self.means.append(means)

    def stall(self, state: TrainState, seconds: float) -> None:
        """Keep step and time."""
        self.stalls.append((state.step, seconds))

    def stragglers(self, state: TrainState, found: Comparison) -> None:
        """Keep the comparison."""
        self.comparisons.append(found)

    def note(self, text: str | None) -> None:
        """Keep the text."""
        if text is not None:
            self.notes.append(text)

    def record(self, event: str, **fields: Any) -> None:
        """Keep the event."""
        self.events.append({"event": event, **fields})


def run(config: RunConfig, kill_at: int | None = None, recorder: Recorder | None = None) -> Recorder:
    """Train from where the settings say to the end, in this worker's world."""
    launch = read_launch() if torch.distributed.is_initialized() else Launch()
    recorder = Recorder(kill_at=kill_at) if recorder is None else recorder
    derived = derive(config, launch.world_size)
    trail = breadcrumbs.Recorder(rank=launch.rank, world=launch.world_size)
    ctx = build.create_context(config, derived, choose_device(config.train.device, launch), trail)
    machine = build.build_machine(config, derived, ctx)
    part = ephemeral.find_parts(machine, recorder.note) if ephemeral.any_parts(config.checkpoint, ctx) else None
    checkpoint = start.resolve_checkpoint(config.checkpoint, ctx.world) if part is None else part
    identity = corpus.identify(config) if ctx.rank == 0 else None
    is_part = part is not None
    begin = agreed(lambda: start.find_start(config, derived, checkpoint, identity, is_part=is_part), ctx.world)
    segments = begin.state.index_segments
    data = corpus.build_corpus(config, derived, ctx, launch, segments=segments, identity=identity)
    resume.load_weights(machine, begin)
    came_from = begin.checkpoint if begin.with_optimizer else None
    if is_part:
        came_from = durable_before(config, begin.state)
    with stop_on_signals() as stops:
        stops.limit(minutes=config.train.exit_minutes, file=config.train.stop_file)
        trainer.train(machine, data, begin.state, recorder, stops, came_from=came_from)
    data.close()
    return recorder
