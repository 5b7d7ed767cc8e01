"""What the commands that use a model share: which one, on which layout, with which tokenizer."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.commands.pretrain import leave
from megatron_aquila.errors import refuse
from megatron_aquila.plan.sequence import ContextMethod
from megatron_aquila.plan.shape import RopeScaling
from megatron_aquila.train.launcher import Launch, read_launch

if TYPE_CHECKING:
    from megatron_aquila.data.tokenizer import Tokenizer
    from megatron_aquila.generate.runner import Layout, Runner
    from megatron_aquila.generate.source import Source


def on_ranks(work: Callable[[Launch], None]) -> int:
    """Do this rank's part of a command that torchrun may have started several times; returns its exit status.

    A rank that failed among others leaves at once, as they may wait for it.
    """
    launch = read_launch()
    with exit_code(rank=launch.rank) as code:
        work(launch)
    if code.value != 0 and launch.world_size > 1:
        leave(code.value)
    return code.value


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model and how it is split."""

    load: Path
    """a checkpoint, the folder whose `latest` names one, published weights of a known family, or Megatron's files"""
    tp: int = 1
    """tensor-parallel degree"""
    cp: int = 1
    """context-parallel degree: ranks that share the tokens of a row"""
    cp_method: ContextMethod = "ring"
    """ring attention (K/V sent peer to peer), or ulysses (all-to-all over heads)"""
    pp: int = 1
    """pipeline-parallel degree; start tp x cp x pp processes with torchrun"""
    precision: Literal["bf16", "fp16", "fp32", "fp64"] | None = None
    """type to compute in; default as the weights are stored"""
    seq_len: int | None = None
    """longest sequence: of a prompt with its answer, a window or the harness's texts; default the model's own, beyond
    which it may be asked, too"""
    rope_scaling: RopeScaling | None = None
    """stretch rotary positions so, in place of the model's own way"""
    rope_factor: float | None = None
    """rope_scaling: how many times; default what leads from the model's longest sequence to --seq-len"""
    rope_trained_len: int | None = None
    """rope_scaling: tokens of a sample in training; default the model's"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    vocab_file: Path | None = None
    """vocab.json, with --merge-file and --special-tokens-file; default the tokenizer that the model came with"""
    merge_file: Path | None = None
    """merges.txt"""
    special_tokens_file: Path | None = None
    """special_tokens.txt"""
    tokenizer_model: Path | None = None
    """tokenizer.json, or a SentencePiece .model"""
    timeout_minutes: float = 10.0
    """a collective that takes longer ends the command"""


def read_source(options: ModelOptions, launch: Launch, *, replicates: bool) -> "Source":
    """The model's tables of contents, once the layout fits it, with the longest sequence and the positions asked for.

    Rank 0 warns of positions that are new to the model.

    Raises:
        ConfigError: the layout does not fit the model or the processes, or nothing can be stretched so; the same on
            every rank.
        CheckpointError: as ``open_source``.
    """
    from megatron_aquila.generate.runner import layout_problems
    from megatron_aquila.generate.source import open_source
    from megatron_aquila.generate.stretch import beyond_training, stretched

    source = open_source(options.load, tp=max(1, options.tp))
    refuse(layout_problems(source.shape, layout(options), world_size=launch.world_size, replicates=replicates))
    shape = stretched(
        source.shape,
        seq_len=options.seq_len,
        scaling=options.rope_scaling,
        factor=options.rope_factor,
        length=options.rope_trained_len,
    )
    warning = beyond_training(source.shape, shape)
    if warning is not None and launch.rank == 0:
        print(warning, file=sys.stderr)
    return replace(source, shape=shape)


def layout(options: ModelOptions) -> "Layout":
    """How the flags split the model."""
    from megatron_aquila.generate.runner import Layout

    return Layout(tp=options.tp, cp=options.cp, pp=options.pp, cp_method=options.cp_method)


def read_tokenizer(options: ModelOptions, source: "Source") -> "Tokenizer":
    """The tokenizer of the flags, else the model's own. Raises as ``generate.tokenizers.open_tokenizer``."""
    from megatron_aquila.generate.tokenizers import FILES, open_tokenizer

    given = {name: getattr(options, name) for name in FILES}
    return open_tokenizer(source.reader, given, vocab_size=source.shape.vocab_size)


@contextmanager
def running(options: ModelOptions, source: "Source", launch: Launch) -> Iterator["Runner"]:
    """The model, split and read, with a process group around it where there are several processes. Collective."""
    from megatron_aquila.generate.runner import build_runner, create_context
    from megatron_aquila.train import env
    from megatron_aquila.train.build import DTYPES

    env.prepare_environment(in_launch_order=options.tp > 1 or options.cp > 1)
    device = env.choose_device(options.device, launch)
    timeout = timedelta(minutes=options.timeout_minutes)
    with env.process_group(device, launch, timeout):
        ctx = create_context(layout(options), device, launch.world_size, timeout)
        dtype = None if options.precision is None else DTYPES[options.precision]
        yield build_runner(source, ctx, cp_method=options.cp_method, dtype=dtype)
