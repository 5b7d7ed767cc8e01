"""In and out of Hugging Face's form, with transformers as the judge."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_aquila.checkpoint import reader as module
from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.verify.reference import plain_logits
from tests.checkpoint.export import export_files
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE, SHAPES, fill, logical, parameters, whole_chunks

transformers = pytest.importorskip("transformers", reason="the judge of these folders is transformers (extra hf)")

IDS = SpecialIds(bos=41, eos=43, pad=0)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that transformers made and saved, in several shards."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.seq_len,
        rms_norm_eps=SHAPE.norm_eps,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, param in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(param, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        return model(tokens_BS).logits


def checkpoint_of(folder: Path, root: Path, tp: int) -> CheckpointReader:
    """Read into the local parameters of every tensor-parallel rank, and save those."""
    source = HuggingFaceReader(folder)
    assert source.shape_problems(SHAPE) == []
    chunks = [chunk for rank in range(tp) for chunk in whole_chunks(parameters(rank, tp, torch.float32))]
    source.read_into(chunks)
    save_checkpoint(root, 1, chunks, {"shape": asdict(SHAPE)}, ParallelContext.single())
    return CheckpointReader(root)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_in_and_out_is_byte_equal(published: Path, tmp_path: Path, tp: int) -> None:
    reader = checkpoint_of(published, tmp_path / "ours", tp)
    out = tmp_path / "out"
    export_files(reader, out, shape=SHAPE, dtype=torch.float32, ids=IDS, max_bytes=5000)
    before, after = weights(published), weights(out)
    assert before.keys() == after.keys() == SHAPES.keys()
    assert all(after[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in before.items())
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(["config.json", "generation_config.json", "certificate.json", "SHA256SUMS", INDEX, *files])


def test_transformers_computes_the_same_logits(published: Path, tmp_path: Path) -> None:
    reader = checkpoint_of(published, tmp_path / "ours", 2)
    out = tmp_path / "out"
    export_files(reader, out, shape=SHAPE, dtype=torch.float32, ids=IDS)
    tokens_BS = torch.randint(SHAPE.vocab_size, (3, SHAPE.seq_len), generator=torch.Generator().manual_seed(1))
    exported = logits(out, tokens_BS)
    assert torch.equal(exported, logits(published, tokens_BS))
    positions_BS = torch.arange(SHAPE.seq_len).expand(3, -1)
    named = {name: reader.read(name) for name in SHAPES}
    plain = plain_logits(named, SHAPE, tokens_BS, positions_BS)

    def error(other: Tensor) -> float:
        return float((other - exported).abs().max() / exported.abs().max())

    assert error(plain) <= 1e-5
    # The test can fail: another base, epsilon or order of the halves is far outside.
    assert error(plain_logits(named, replace(SHAPE, rope_base=9000.0), tokens_BS, positions_BS)) > 1e-4
    assert error(plain_logits(named, replace(SHAPE, norm_eps=1e-3), tokens_BS, positions_BS)) > 1e-4
    swapped = named | {"model.layers.0.mlp.up_proj.weight": named["model.layers.0.mlp.gate_proj.weight"]}
    assert error(plain_logits(swapped, SHAPE, tokens_BS, positions_BS)) > 1e-4


def test_ids_and_type_are_what_transformers_reads(published: Path, tmp_path: Path) -> None:
    reader = checkpoint_of(published, tmp_path / "ours", 1)
    out = tmp_path / "out"
    export_files(reader, out, shape=SHAPE, dtype=torch.bfloat16, ids=IDS)
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (41, 43, 0)
    assert config.dtype == torch.bfloat16
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (41, 43, 0)
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, reader.read(name).bfloat16()), name
    # and back in: half the bytes, the same names, into fp32 parameters only when that is asked for
    again = HuggingFaceReader(out)
    chunks = whole_chunks(parameters(0, 2, torch.float32))
    with pytest.raises(CheckpointError, match=r"is torch.bfloat16, the model needs torch.float32"):
        again.read_into(chunks)
    again.read_into(chunks, cast=True)
    assert torch.equal(chunks[0].tensor, reader.read(chunks[0].name)[:32].bfloat16().float())


@pytest.fixture
def reader(tmp_path: Path) -> CheckpointReader:
    chunks = whole_chunks(parameters(0, 1, torch.float64))
    fill(chunks)
    save_checkpoint(tmp_path / "ours", 1, chunks, {}, ParallelContext.single())
    return CheckpointReader(tmp_path / "ours")


def test_an_export_that_fails_gets_no_name(reader: CheckpointReader, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def export(**changes: Any) -> None:
        export_files(reader, out, **{"shape": SHAPE, "dtype": torch.float32, "ids": IDS} | changes)

    def refuse(folder: Path) -> None:
        assert (folder / "config.json").is_file()
        raise CheckpointError("the logits differ")

    with pytest.raises(CheckpointError, match="the logits differ"):
        export(finish=refuse)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(44, 12\), a model of this shape needs"):
        export(shape=replace(SHAPE, vocab_size=48), finish=refuse)
    with pytest.raises(CheckpointError, match=r"model.layers.2.* has shape None"):
        export(shape=replace(SHAPE, num_layers=3))
    assert not out.exists()
    export()
    with pytest.raises(CheckpointError, match="out: it exists already; choose a new folder"):
        export()
    assert torch.equal(weights(out)["lm_head.weight"], logical("lm_head.weight", torch.float64).float())


def test_values_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    chunks = whole_chunks(parameters(0, 1, torch.float32))
    fill(chunks)
    chunks[-1].tensor[3, 3] = 70000.0
    save_checkpoint(tmp_path / "ours", 1, chunks, {}, ParallelContext.single())
    ours = CheckpointReader(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values that are not finite in torch.float16"):
        export_files(ours, tmp_path / "out", shape=SHAPE, dtype=torch.float16, ids=IDS)
    assert not (tmp_path / "out").exists()
    export_files(ours, tmp_path / "out", shape=SHAPE, dtype=torch.bfloat16, ids=IDS)


@pytest.fixture
def folder(reader: CheckpointReader, tmp_path: Path) -> Path:
    """A good folder to damage, with one weight file and no index."""
    folder = tmp_path / "folder"
    export_files(reader, folder, shape=SHAPE, dtype=torch.float32, ids=IDS)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    return folder


def test_a_single_file_is_read(folder: Path) -> None:
    found = HuggingFaceReader(folder)
    assert found.shape_problems(SHAPE) == []
    assert torch.equal(found.read("model.norm.weight"), logical("model.norm.weight", torch.float64).float())


def test_folders_that_cannot_be_read(folder: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            HuggingFaceReader(folder)
        assert str(folder) in str(caught.value)

    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for bad in (whole[:-1], whole[:5], b"", b"\xff" * len(whole)):
        file.write_bytes(bad)
        refused("model.safetensors: it cannot be read: .*; download it again")
    save_file({"x": torch.zeros(2, dtype=torch.int8)}, file)
    refused("x is of type I8; only F64, F32")
    file.unlink()
    refused(f"it holds neither model.safetensors nor {INDEX}")
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(r"pytorch_model-00001-of-00002.bin: a run does not start from pickled weights; .*aquila convert --from")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../model-1.safetensors"}}))
    refused("folder/model-1.safetensors: it cannot be read: No such file")
    (folder / INDEX).write_text("{}")
    refused(f"{INDEX}: it has no weight_map")
    (folder / "config.json").write_text("[]")
    refused("config.json: it is not a JSON object")
    (folder / "config.json").write_text("{")
    refused("config.json: it cannot be read")
    (folder / "config.json").unlink()
    refused("config.json: it cannot be read: .*No such file")
    with pytest.raises(CheckpointError, match="elsewhere: there is no such folder"):
        HuggingFaceReader(folder / "elsewhere")


def changed(folder: Path, **entries: Any) -> HuggingFaceReader:
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    return HuggingFaceReader(folder)


def test_another_model_is_told_apart(folder: Path) -> None:
    found = HuggingFaceReader(folder)
    assert found.shape_problems(replace(SHAPE, padded_vocab_size=128, seq_len=99)) == []
    assert found.shape_problems(replace(SHAPE, norm_order="llama")) == ["norm_order is aquila there, llama in this run"]
    assert changed(folder, norm_order="gone").shape_problems(replace(SHAPE, norm_order="llama")) == []
    assert changed(folder, norm_order="mine").shape_problems(SHAPE) == [
        "norm_order is 'mine'; only 'aquila' or 'llama' is supported"
    ]
    changed(folder, norm_order="aquila")
    assert found.shape_problems(replace(SHAPE, rope_base=5e5, vocab_size=43)) == [
        "vocab_size is 44 there, 43 in this run",
        "rope_base is 10000.0 there, 500000.0 in this run",
    ]
    strangers = found.shape_problems(replace(SHAPE, num_layers=1))
    assert strangers[0] == "num_layers is 2 there, 1 in this run"
    assert "model.layers.1.mlp.up_proj.weight has no place in the model" in strangers
    assert changed(folder, tie_word_embeddings=True).shape_problems(SHAPE) == [
        "tie_word_embeddings is True; only False is supported"
    ]
    with pytest.raises(CheckpointError, match=r"config.json: it has no entry 'num_hidden_layers'; not a Llama model"):
        changed(folder, tie_word_embeddings=False, num_hidden_layers="gone").shape_problems(SHAPE)


def test_frequencies_of_old_exports_are_no_strangers(folder: Path) -> None:
    tensors = weights(folder)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, folder / "model.safetensors")
    assert HuggingFaceReader(folder).shape_problems(SHAPE) == []
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, folder / "model.safetensors")
    problems = HuggingFaceReader(folder).shape_problems(SHAPE)
    assert problems == ["model.layers.0.self_attn.q_proj.bias has no place in the model"]


def test_a_missing_tensor_is_an_error_never_random_weights(folder: Path) -> None:
    tensors = weights(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    chunk = Chunk("lm_head.weight", (44, 12), (0, 0), torch.zeros(44, 12))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not in it"):
        HuggingFaceReader(folder).read_into([chunk])


def test_only_needed_shards_are_opened(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceReader(published)
    opened: list[str] = []
    original: Callable[..., Any] = module.safe_open
    monkeypatch.setattr(module, "safe_open", lambda path, **kw: opened.append(path.name) or original(path, **kw))
    source.read("model.norm.weight")
    assert len(opened) == 1
