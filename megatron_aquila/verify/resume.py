"""Is a run that was stopped and resumed, in other processes, the run that never was? Bit for bit, on small settings."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.check import check
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.errors import ConfigError
from megatron_aquila.observe.log import Log
from megatron_aquila.observe.report import StepReport
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.train.build import create_context
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.launcher import read_launch
from megatron_aquila.train.loss import LossMeans
from megatron_aquila.train.run import Prepared, prepare
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.stops import StopRequest
from megatron_aquila.train.stragglers import Comparison
from megatron_aquila.train.trainer import train
from megatron_aquila.verify.layout import requested_layout, with_layout
from megatron_aquila.verify.observe import PATIENCE
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import EOD, VOCAB_SIZE, shrink

DOCUMENTS, LONGEST = 60, 60  # of each of the two data sets that are written for the proof
Spoil = Callable[[Prepared], TrainState]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One thing that must not differ: the digest of it in both runs, and where it differs first."""

    name: str
    whole: str
    resumed: str
    first_difference: str | None = None

    @property
    def holds(self) -> bool:
        """Whether every bit is equal."""
        return self.whole == self.resumed


@dataclass
class Leg:
    """What a rank saw of a run. A reporter."""

    steps: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # loss, gradient norm, learning rate
    losses: dict[int, float] = field(default_factory=dict)  # of validations
    data: dict[int, str] = field(default_factory=dict)  # digest of this rank's batches, by consumed samples
    random: str = ""

    def step(self, report: StepReport) -> None:
        """Keep the figures."""
        self.steps[report.step] = (report.loss, report.grad_norm, report.lr)

    def validation(self, state: TrainState, means: LossMeans) -> None:
        """Keep the loss."""
        self.losses[state.step] = means.loss

    def stall(self, state: TrainState, seconds: float) -> None:
        """Nothing."""

    def stragglers(self, state: TrainState, found: Comparison) -> None:
        """Nothing."""

    def note(self, text: str | None) -> None:
        """Nothing."""

    def record(self, event: str, **fields: Any) -> None:
        """Nothing."""


def small_run(config: RunConfig, folder: Path, *, steps: int) -> RunConfig:
    """``config`` made small, in its own precision where a CPU has it, for ``2 * steps`` steps on data in ``folder``.

    Kept: layout, schedule, overlap, precision, how the optimizer keeps its states, documents, saving, what is done
    about bad numbers. Raises ``ConfigError`` where that cannot run.
    """
    layout, optim, precision = requested_layout(config), config.optim, config.train.precision
    small = with_layout(shrink(config, layout), layout)
    batch = small.train.global_batch
    small = replace(
        small,
        parallel=replace(small.parallel, grad_reduce=config.parallel.grad_reduce),
        data=replace(
            small.data, path=write_data(folder), train_path=(), valid_path=(), test_path=(), phases=(), valid_sets=(),
            max_epochs_per_source=(), split="90,10,0", cache_path=folder / "cache", vocab_file=None, merge_file=None,
            special_tokens_file=None, tokenizer_model=None,
        ),
        optim=replace(
            small.optim, moments_dtype=optim.moments_dtype, master_weights=optim.master_weights, lr_decay_samples=None,
            lr_wsd_decay_samples=steps * batch if optim.lr_decay == "wsd" else None,
        ),
        train=replace(
            small.train, precision="bf16" if precision == "fp8" else precision, train_samples=2 * steps * batch,
            eval_interval=steps, eval_iters=1, exit_samples=None, exit_minutes=None, skip_samples=(), check_replicas=1,
        ),
        checkpoint=replace(
            small.checkpoint, save=folder / "whole", load=None, resume=True, save_interval=steps, init_from_hf=None,
            rampup_save_interval=None, load_optim=True, override_data=False, override_lr_schedule=False,
        ),
        observe=replace(small.observe, log_dir=None, tensorboard_dir=None, wandb_project=None, profile_steps=None),
    )  # fmt: skip
    problems = check(small, layout.world_size)
    if problems:
        raise ConfigError(problems)
    return small


def write_data(folder: Path) -> tuple[str, ...]:
    """Two small data sets of counting sequences whose documents end, as a weighted ``data.path``."""
    generator = np.random.default_rng(0)
    for name, stride in (("threes", 3), ("fives", 5)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for _ in range(DOCUMENTS):
                start, length = generator.integers(VOCAB_SIZE), generator.integers(10, LONGEST)
                tokens = (start + stride * np.arange(length)) % VOCAB_SIZE
                tokens[-1] = EOD
                writer.add_sequence(tokens)
                writer.end_document()
    return ("0.7", str(folder / "threes"), "0.3", str(folder / "fives"))


def prove_resume(config: RunConfig, *, spoil: Spoil | None = None) -> list[Kind]:
    """Run ``config`` (of ``small_run``) once as it is, and once stopped half-way and resumed by new processes.

    ``spoil`` is called in each of these before they go on: it breaks what a test wants broken.
    """
    save = config.checkpoint.save
    assert save is not None, "a small run has a folder"
    again = replace(config, checkpoint=replace(config.checkpoint, save=save.parent / "resumed"))
    half = replace(again, train=replace(again.train, exit_samples=config.train.train_samples // 2))
    whole = in_new_processes(config)
    before = in_new_processes(half)
    after = in_new_processes(again, spoil)
    joined = [
        replace(second, steps=first.steps | second.steps, losses=first.losses | second.losses,
                data=first.data | second.data)
        for first, second in zip(before, after, strict=True)
    ]  # fmt: skip
    return [*compare_legs(whole, joined), *compare_checkpoints(save, save.parent / "resumed")]


def in_new_processes(config: RunConfig, spoil: Spoil | None = None) -> list[Leg]:
    """Train to the end of the settings, on gloo processes that have done nothing before; by rank."""
    with WorkerPool(requested_layout(config).world_size) as pool:
        return pool.run(run_leg, config, spoil, timeout=PATIENCE)


def run_leg(config: RunConfig, spoil: Spoil | None = None) -> Leg:
    """One rank's part of a run from wherever its folder says, in a worker. Collective."""
    launch = read_launch()
    derived, leg = derive(config, launch.world_size), Leg()
    ctx = create_context(config, derived, torch.device("cpu"))
    run = prepare(config, derived, ctx, launch, Log(enabled=False))
    state = run.start.state if spoil is None else spoil(run)
    watch(run.corpus, leg)
    train(run.machine, run.corpus, state, leg, StopRequest(), came_from=run.came_from)
    run.corpus.close()
    leg.random = digest(torch.random.get_rng_state().numpy().tobytes())
    return leg


def watch(corpus: Corpus, leg: Leg) -> None:
    """Let ``leg`` know what the loader hands out."""
    fetch = corpus.train.fetch

    def watched(consumed_samples: int, global_batch: int) -> list[Batch]:
        batches = fetch(consumed_samples, global_batch)
        leg.data[consumed_samples] = digest(*(batch.tokens_BS.numpy().tobytes() for batch in batches))
        return batches

    corpus.train.fetch = watched  # type: ignore[method-assign]  # of this one loader


def compare_legs(whole: Sequence[Leg], resumed: Sequence[Leg]) -> list[Kind]:
    """What the ranks saw of both runs."""
    views: Mapping[str, Callable[[Leg], Mapping[Any, Any]]] = {
        "losses": lambda leg: {f"step {step}": figures[0].hex() for step, figures in leg.steps.items()},
        "gradient norms": lambda leg: {f"step {step}": figures[1].hex() for step, figures in leg.steps.items()},
        "learning rates": lambda leg: {f"step {step}": figures[2].hex() for step, figures in leg.steps.items()},
        "validation losses": lambda leg: {f"step {step}": loss.hex() for step, loss in leg.losses.items()},
        "data order": lambda leg: {f"sample {sample}": found for sample, found in leg.data.items()},
        "random numbers": lambda leg: {"at the end": leg.random},
    }

    def ranks(legs: Sequence[Leg], view: Callable[[Leg], Mapping[Any, Any]]) -> dict[str, str]:
        return {f"rank {rank}, {key}": value for rank, leg in enumerate(legs) for key, value in view(leg).items()}

    return [kind(name, ranks(whole, view), ranks(resumed, view)) for name, view in views.items()]


def compare_checkpoints(whole: Path, resumed: Path) -> list[Kind]:
    """The last checkpoints of both runs: tensors, and all that is not one."""
    readers = [CheckpointReader(whole), CheckpointReader(resumed)]
    tensors = [{name: digest(bits(reader.read(name))) for name in sorted(reader.tensors)} for reader in readers]

    def part(found: Mapping[str, str], *, of_optimizer: bool) -> dict[str, str]:
        return {name: value for name, value in found.items() if name.startswith("optimizer.") == of_optimizer}

    states = [{str(key): repr(value) for key, value in sorted(reader.state["train"].items())} for reader in readers]  # type: ignore[union-attr]
    return [
        kind("parameters", *(part(found, of_optimizer=False) for found in tensors)),
        kind("optimizer", *(part(found, of_optimizer=True) for found in tensors)),
        kind("training state", *states),
    ]


def kind(name: str, whole: Mapping[str, str], resumed: Mapping[str, str]) -> Kind:
    """Two tables as one verdict."""
    keys = [*whole, *(key for key in resumed if key not in whole)]
    first = next((key for key in keys if whole.get(key) != resumed.get(key)), None)
    words = [digest(repr(sorted(table.items())).encode()) for table in (whole, resumed)]
    return Kind(name=name, whole=words[0], resumed=words[1], first_difference=first)


def bits(x: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes) -> str:
    """BLAKE2b of the parts, one after the other, in 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
