"""Published files of a checkpoint, as ``aquila convert`` writes them, without its flags."""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_aquila.checkpoint import conversion
from megatron_aquila.checkpoint.families import FAMILIES
from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.plan.shape import ModelShape

NO_IDS = SpecialIds(bos=None, eos=None, pad=None)


def export_files(
    reader: TensorReader,
    out_dir: Path,
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    ids: SpecialIds = NO_IDS,
    max_bytes: int = 5 * 10**9,
    family: str = "llama",
    finish: Callable[[Path], object] = lambda folder: None,
) -> None:
    """``out_dir`` with the model; ``finish`` is given the folder before it has its name."""
    target = conversion.huggingface_target(reader, shape, FAMILIES[family], dtype=dtype, max_bytes=max_bytes, ids=ids)
    inputs = conversion.Inputs(conversion.content_of(reader))
    with conversion.alone(out_dir):
        folder = conversion.convert(reader, shape, target, out_dir, dtype=dtype, inputs=inputs)
        finish(folder)
        conversion.publish(folder, out_dir, logits="not compared")
