"""Optimizer states in a checkpoint: whichever way a run kept its masters and moments, another may read them in its own.

A master is stored whole, or as the remainder that its bfloat16 weight lacks; no way between the two loses a bit.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.kernels.remainder import join, split

MASTER, REMAINDER, MOMENTS = (
    "optimizer.master.",
    "optimizer.remainder.",
    ("optimizer.exp_avg.", "optimizer.exp_avg_sq."),
)


def read_weights(reader: TensorReader, chunks: Sequence[Chunk], *, with_remainders: bool, cast: bool) -> None:
    """Fill weights. Local. Raises ``CheckpointError`` as ``reader.read_into``.

    From masters where the stored weights are narrower than wanted; and where remainders of masters that are stored
    whole are to be read next: of two nearest weights it is then the one that the remainder belongs to.
    """
    direct = []
    for chunk in chunks:
        stored = reader.tensors.get(chunk.name)
        narrow = stored is not None and stored.dtype.itemsize < chunk.tensor.dtype.itemsize
        if narrow and any(kept + chunk.name in reader.tensors for kept in (MASTER, REMAINDER)):
            chunk.tensor.copy_(_master(reader, chunk, chunk.name))
        elif with_remainders and MASTER + chunk.name in reader.tensors:
            chunk.tensor.copy_(split(_master(reader, chunk, chunk.name))[0])
        else:
            direct.append(chunk)
    reader.read_into(direct, cast=cast)


def read_states(reader: CheckpointReader, chunks: Sequence[Chunk]) -> None:
    """Fill masters or remainders, and moments. Local. Raises ``CheckpointError`` as ``reader.read_into``."""
    moments, direct = [], []
    for chunk in chunks:
        if chunk.name.startswith(MOMENTS):
            moments.append(chunk)
        elif chunk.name in reader.tensors:
            direct.append(chunk)
        elif chunk.name.startswith(MASTER):
            chunk.tensor.copy_(_master(reader, chunk, chunk.name.removeprefix(MASTER)))
        else:
            chunk.tensor.copy_(split(_master(reader, chunk, chunk.name.removeprefix(REMAINDER)))[1])
    reader.read_into(direct)
    reader.read_into(moments, cast=True)


def conversions(reader: CheckpointReader, optim: OptimConfig) -> list[str]:
    """What is kept in another way there than here, a line each."""
    lines = []
    whole, parted = (any(name.startswith(prefix) for name in reader.tensors) for prefix in (MASTER, REMAINDER))
    if (whole and optim.master_weights == "remainder") or (parted and optim.master_weights == "fp32"):
        ways = ("whole", "remainders") if whole else ("remainders", "whole")
        lines.append(f"masters: kept as {ways[0]} in the checkpoint, as {ways[1]} here; no bit is lost")
    dtypes = {stored.dtype for name, stored in reader.tensors.items() if name.startswith(MOMENTS)}
    if torch.bfloat16 in dtypes and optim.moments_dtype == "fp32":
        lines.append("moments: kept in bf16 in the checkpoint, in fp32 here; no bit is lost")
    if torch.float32 in dtypes and optim.moments_dtype == "bf16":
        lines.append("moments: kept in fp32 in the checkpoint, rounded to bf16 here")
    return lines


def _master(reader: TensorReader, like: Chunk, name: str) -> Tensor:
    """The float32 masters of tensor ``name`` in the rectangle of ``like``, however they are stored."""
    master = torch.empty(like.tensor.shape, dtype=torch.float32)
    if REMAINDER + name not in reader.tensors:
        reader.read_into([replace(like, name=MASTER + name, tensor=master)])
        return master
    weight, remainder = (torch.empty_like(master, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    reader.read_into([
        replace(like, name=name, tensor=weight),
        replace(like, name=REMAINDER + name, tensor=remainder),
    ])  # fmt: skip
    return join(weight, remainder)
