"""What ``--load`` names: weights of any form that is known, and the shape of their model."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_aquila.checkpoint.published import ROWS, model_shape, open_weights
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape, padded_vocab_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights on disk and the shape of their model."""

    reader: TensorReader
    shape: ModelShape

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in."""
        return self.reader.tensors["model.norm.weight"].dtype


def open_source(path: Path, *, tp: int) -> Source:
    """The model in ``path``; its vocabulary is padded to be split over ``tp``. Reads tables of contents only.

    Raises:
        CheckpointError: there are no weights of a known form, or the model is none that is built here.
    """
    reader = open_weights(path)
    shape = model_shape(reader)
    problems = reader.shape_problems(shape)
    if problems:
        raise CheckpointError(f"--load {path}: " + "; ".join(problems))
    rows = padded_vocab_size(shape.vocab_size, math.lcm(ROWS, tp))
    return Source(reader=reader, shape=replace(shape, padded_vocab_size=rows))
