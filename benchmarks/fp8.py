"""``python -m benchmarks.fp8``: the loss of a small model in fp8 beside that in bf16, on the same samples.

How fast fp8 is at a large model's sizes: ``python -m benchmarks.step --precision fp8``.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import GpuOptions, Record, find_device, options_of, result_file, settle
from benchmarks.contestants import OurStep, RandomTokens, Silent
from benchmarks.shapes import LEARNING, model_config
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.blend import build_datasets
from megatron_aquila.data.samples import Sample, SampleSource
from megatron_aquila.observe.report import StepReport
from megatron_aquila.plan.flops import num_params
from megatron_aquila.plan.shape import Precision
from megatron_aquila.train.env import prepare_environment

GOAL = 0.005  # the loss's distance that is allowed
FOLLOWERS = 32  # tokens that may follow one in the made-up language
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")


@dataclass(frozen=True, kw_only=True)
class Options(GpuOptions):
    """Two trainings of a model of 219 million parameters from the same weights, on the same samples."""

    steps: int = 1000
    """Steps of each."""
    window: int = 50
    """Steps whose mean loss is compared."""
    seq_len: int = 1024
    """Tokens of a sample."""
    batch: int = 32
    """Samples of a step."""
    lr: float = 3e-4
    """The learning rate's peak, after a tenth of the steps; it falls to a tenth."""
    data: Path | None = None
    """Prefix of a data set to train on, of at most 32,768 tokens in its vocabulary; default a made-up language."""
    seed: int = 1234
    """Of weights and samples."""


class Losses(Silent):
    """A reporter that keeps each step's loss."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def step(self, report: StepReport) -> None:
        """One more."""
        self.of_steps.append(report.loss)


@dataclass(frozen=True, slots=True)
class Language(RandomTokens):
    """Samples in which each token has few followers, likely and unlikely ones, so that there is something to learn."""

    rows: NDArray[np.int32] | None = None

    @classmethod
    def of(cls, vocab_size: int, seq_len: int, count: int, seed: int) -> "Language":
        """``count`` samples."""
        random = np.random.default_rng(seed)
        followers = random.integers(vocab_size, size=(vocab_size, FOLLOWERS), dtype=np.int32)
        rows = np.empty((count, seq_len + 1), np.int32)
        rows[:, 0] = random.integers(vocab_size, size=count)
        for place in range(seq_len):
            chosen = np.minimum(random.geometric(0.2, size=count) - 1, FOLLOWERS - 1)
            rows[:, place + 1] = followers[rows[:, place], chosen]
        return cls(vocab_size, seq_len, names=("a made-up language",), rows=rows)

    def __len__(self) -> int:
        """Samples."""
        assert self.rows is not None, "a language without samples"
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample ``index``."""
        assert self.rows is not None, "a language without samples"
        return Sample(self.rows[index].astype(np.int64), 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "fp8", argv)
    prepare_environment()
    device = find_device(options)
    if device is None:
        return 0
    named = options if options.data is None else replace(options, data=Path(options.data.name))
    record = Record("fp8", settings=named, device=device, out=result_file("fp8", options))
    source = samples(options)
    losses = {precision: train(run_config(precision, options), source, options, device) for precision in PRECISIONS}
    compare(record, losses, options)
    return 0


def run_config(precision: Precision, options: Options) -> RunConfig:
    """The settings of one training."""
    total, tenth = options.steps * options.batch, options.steps * options.batch // 10
    sizes = {
        "--precision": precision,
        "--seq-len": options.seq_len,
        "--global-batch": options.batch,
        "--micro-batch": max(1, options.batch // 2),
        "--train-samples": total,
        "--lr": options.lr,
        "--min-lr": options.lr / 10,
        "--lr-warmup-samples": tenth,
        "--lr-decay-samples": total,
        "--device": options.device,
    }
    words = [str(word) for pair in sizes.items() for word in pair]
    return model_config("tiny" if options.tiny else LEARNING, *words)


def samples(options: Options) -> SampleSource:
    """What both train on, and one step more, with which the last is told."""
    count = (options.steps + 1) * options.batch
    if options.data is None:
        shape = derive(run_config("bf16", options), 1).shape
        return Language.of(shape.vocab_size, options.seq_len, count, options.seed)
    sizes = (count, None, None)
    prefix, length = str(options.data), options.seq_len
    made = build_datasets([prefix], sizes=sizes, split="1", seq_len=length, seed=options.seed, cache_path=None)
    assert made.train is not None, "a split that is all training has training samples"
    return made.train


def train(config: RunConfig, source: SampleSource, options: Options, device: torch.device) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(options.seed)  # the weights
    told = Losses()
    step = OurStep(config, device, source).telling(told)
    for _ in range(options.steps + 1):
        step()
    settle(device)
    return told.of_steps[: options.steps]


def compare(record: Record, losses: dict[Precision, list[float]], options: Options) -> None:
    """A row for each window of steps, and one for all: how far fp8's loss is from bf16's."""
    found = []
    for start in range(0, options.steps, options.window):
        means = {name: statistics.fmean(each[start : start + options.window]) for name, each in losses.items()}
        found.append(means["fp8"] / means["bf16"] - 1)
        row = {name: said(value) for name, value in [*means.items(), ("difference", found[-1])]}
        record.add("loss", last_step=min(start + options.window, options.steps), **row)
    worst = max(found, key=lambda difference: abs(difference) if isfinite(difference) else inf)
    record.add(
        "all steps",
        parameters=num_params(derive(run_config("bf16", options), 1).shape),
        steps=options.steps,
        worst=said(worst),
        last=said(found[-1]),
        holds=abs(worst) <= GOAL,
    )


def said(value: float) -> float | str:
    """As JSON has it, which has no word for what is not finite."""
    return value if isfinite(value) else str(value)


if __name__ == "__main__":
    sys.exit(main())
