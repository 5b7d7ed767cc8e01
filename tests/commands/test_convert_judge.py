import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.strips import TensorMap
from megatron_aquila.commands import convert
from megatron_aquila.parallel.context import ParallelContext
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE

pytest.importorskip("transformers", reason="the judge is transformers (extra hf)")

AGREE = "fp32 logits agree with transformers"
MEGATRON = ("--to-format", "megatron", "--tp", "2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    weights = {name: torch.randn(size) * 0.3 + ("norm" in name) for name, size in llama_tensors(SHAPE).items()}
    chunks = [Chunk(name, tuple(x.shape), (0,) * x.dim(), x) for name, x in weights.items()]
    save_checkpoint(tmp_path / "run", 3, chunks, {"shape": asdict(SHAPE)}, ParallelContext.single())
    return tmp_path / "run"


def to(source: Path, output: Path, *flags: str) -> str:
    """What the certificate says of logits."""
    command = ["--from", str(source), "--to", str(output), "--no-tokenizer", *flags]
    assert convert.main(command) == 0
    return str(json.loads((output / "certificate.json").read_text())["logits"])


def test_every_way_of_a_llama_is_judged(checkpoint: Path, tmp_path: Path) -> None:
    assert AGREE in to(checkpoint, tmp_path / "megatron", *MEGATRON)
    sizes = ("--vocab-size", str(SHAPE.vocab_size), "--seq-len", str(SHAPE.seq_len), "--norm-order", "aquila")
    assert AGREE in to(tmp_path / "megatron", tmp_path / "ours", *sizes)
    assert AGREE in to(tmp_path / "megatron", tmp_path / "hf", "--to-format", "hf", *sizes)
    assert AGREE in to(tmp_path / "hf", tmp_path / "megatron2", *MEGATRON)


def test_aquila2s_own_config_is_judged_without_its_code(checkpoint: Path, tmp_path: Path) -> None:
    to(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    own = {"model_type": "aquila", "auto_map": {"AutoConfig": "configuration_aquila.AquilaConfig"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | own))
    assert AGREE in to(tmp_path / "hf", tmp_path / "ours")


def test_rounding_to_the_written_type_is_no_difference(checkpoint: Path, tmp_path: Path) -> None:
    line = to(checkpoint, tmp_path / "hf", "--dtype", "fp32")
    assert "casts a norm's result after its weight, transformers' before" in line
    assert AGREE in to(tmp_path / "hf", tmp_path / "ours", "--dtype", "bf16")


def test_a_map_that_is_wrong_both_ways_is_seen(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to(checkpoint, tmp_path / "hf")
    original = TensorMap.our_tensor

    def swapped(tensors: TensorMap, name: str, load: object) -> torch.Tensor:
        other = {"k_proj": "v_proj", "v_proj": "k_proj"}
        parts = name.split(".")
        return original(tensors, ".".join(other.get(part, part) for part in parts), load)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorMap, "our_tensor", swapped)
    monkeypatch.setattr("megatron_aquila.checkpoint.conversion._read_back", lambda *_: {})
    command = ["--from", str(tmp_path / "hf"), "--to", str(tmp_path / "out"), "--no-tokenizer", *MEGATRON]
    assert convert.main(command) == 2
    assert "logits differ from ours" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_transformers_has_not_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = replace(SHAPE, num_kv_heads=SHAPE.num_heads, position_embedding="rope-interleaved", score_clamp=1024.0)
    for name, shape in (("wide", old), ("old", replace(old, head_dim=SHAPE.hidden_size // SHAPE.num_heads))):
        weights = {name: torch.randn(size) * 0.3 for name, size in llama_tensors(shape).items()}
        chunks = [Chunk(name, tuple(x.shape), (0,) * x.dim(), x) for name, x in weights.items()]
        save_checkpoint(tmp_path / name, 3, chunks, {"shape": asdict(shape)}, ParallelContext.single())
    line = to(tmp_path / "old", tmp_path / "hf", "--family", "aquila")
    assert line == "logits not compared: in transformers' Llama rotary pairs stand half a head apart"
    wide = ["--from", str(tmp_path / "wide"), "--to", str(tmp_path / "out"), "--no-tokenizer", "--family", "aquila"]
    assert convert.main(wide) == 2
    assert "its files cannot hold this model: the heads fill the hidden size" in capsys.readouterr().err
