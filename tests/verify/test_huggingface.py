from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.layout import param_chunks
from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.model.aquila import build_stages
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages
from megatron_aquila.verify.huggingface import BOUND, compare_logits, our_logits, their_logits
from tests.checkpoint.export import export_files
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE, fill, parameters, whole_chunks

transformers = pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")

FILE = "model-00001-of-00001.safetensors"


def export(tmp_path: Path, dtype: torch.dtype) -> tuple[CheckpointReader, Path]:
    chunks = whole_chunks(parameters(0, 1, torch.float64))
    fill(chunks)
    shape = replace(SHAPE, norm_eps=1e-5)
    save_checkpoint(tmp_path / "ours", 1, chunks, {"shape": asdict(shape)}, ParallelContext.single())
    reader = CheckpointReader(tmp_path / "ours")
    export_files(
        reader, tmp_path / "out", shape=shape, dtype=dtype, ids=SpecialIds(bos=None, eos=1, pad=None)
    )  # fmt: skip
    return reader, tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    reader, folder = export(tmp_path, dtype)
    found = compare_logits(reader, HuggingFaceReader(folder), reader.shape(), dtype=dtype)
    assert found.fp32 < BOUND < found.bf16 < 0.1
    assert BOUND < found.rounding < 0.1
    assert 0.5 < found.same_next <= 1
    assert str(found).startswith("fp32 logits agree")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_at_a_time_is_the_whole_model_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    reader, folder = export(tmp_path, torch.float32)
    shape, tokens_BS = reader.shape(), torch.arange(14).view(2, 7)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        theirs = their_logits(HuggingFaceReader(folder), shape, torch.float32, tokens_BS, compute=dtype)
        assert torch.equal(theirs, model(tokens_BS).logits.float())
        ours = our_logits(reader, shape, torch.float32, tokens_BS, compute=dtype)
        assert torch.equal(ours, whole_model(reader, shape, tokens_BS, dtype).float())


def whole_model(
    reader: CheckpointReader, shape: ModelShape, tokens_BS: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """All layers on one stage."""
    ctx = ParallelContext.single()
    placement = Placement(tp=ctx.tp, sequence_parallel=False, dtype=dtype, device=ctx.device)
    kernels = choose_kernels(ctx.device, dtype)
    (stage,) = build_stages(shape, plan_stages(shape, 1), pp_rank=0, placement=placement, kernels=kernels).values()
    for info in stage.param_infos():
        info.param.zero_()
        reader.read_into(param_chunks(info), cast=True)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return stage.logits(None, tokens_BS, positions_BS)[..., : shape.vocab_size].transpose(0, 1)


def test_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, folder = export(tmp_path, torch.float32)
    original, filled, most = torch.nn.Module.to_empty, set[int](), list[int]()

    def watched(module: torch.nn.Module, *, device: str, recurse: bool) -> torch.nn.Module:
        (filled.discard if device == "meta" else filled.add)(id(module))
        most.append(len(filled))
        return original(module, device=device, recurse=recurse)

    monkeypatch.setattr(torch.nn.Module, "to_empty", watched)
    with torch.no_grad():
        their_logits(HuggingFaceReader(folder), reader.shape(), torch.float32, torch.arange(14).view(2, 7))
    assert max(most) == 1
    assert not filled


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_one_wrong_value_is_seen(tmp_path: Path, name: str) -> None:
    reader, folder = export(tmp_path, torch.float32)
    tensors = load_file(folder / FILE)
    tensors[name].view(-1)[3] += 0.1
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"logits differ from .* of the largest, more than 1e-05"):
        compare_logits(reader, HuggingFaceReader(folder), reader.shape(), dtype=torch.float32)


def test_a_tensor_that_transformers_would_draw_at_random_is_seen(tmp_path: Path) -> None:
    reader, folder = export(tmp_path, torch.float32)
    tensors = load_file(folder / FILE)
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformers"):
        compare_logits(reader, HuggingFaceReader(folder), reader.shape(), dtype=torch.float32)
