from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_aquila.checkpoint.huggingface import export_huggingface
from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.store import CheckpointReader, save_checkpoint
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.verify.huggingface import compare_logits
from tests.checkpoint.toy import SHAPE, fill, parameters, whole_chunks

pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")

FILE = "model-00001-of-00001.safetensors"


def export(tmp_path: Path, dtype: torch.dtype) -> tuple[CheckpointReader, Path]:
    chunks = whole_chunks(parameters(0, 1, torch.float64))
    fill(chunks)
    shape = replace(SHAPE, norm_eps=1e-5)
    save_checkpoint(tmp_path / "ours", 1, chunks, {"shape": asdict(shape)}, ParallelContext.single())
    reader = CheckpointReader(tmp_path / "ours")
    export_huggingface(
        reader, tmp_path / "out", shape=shape, dtype=dtype, ids=SpecialIds(bos=None, eos=1, pad=None)
    )  # fmt: skip
    return reader, tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    reader, folder = export(tmp_path, dtype)
    assert compare_logits(reader, folder, reader.shape()).startswith("fp32 logits agree")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_one_wrong_value_is_seen(tmp_path: Path, name: str) -> None:
    reader, folder = export(tmp_path, torch.float32)
    tensors = load_file(folder / FILE)
    tensors[name].view(-1)[3] += 0.1
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"logits differ from .* of the largest, more than 1e-05"):
        compare_logits(reader, folder, reader.shape())


def test_a_tensor_that_transformers_would_draw_at_random_is_seen(tmp_path: Path) -> None:
    reader, folder = export(tmp_path, torch.float32)
    tensors = load_file(folder / FILE)
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformers"):
        compare_logits(reader, folder, reader.shape())
