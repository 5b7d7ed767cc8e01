"""Networks of the families whose remote code is not at hand, written from their descriptions; and files for them."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megatron_aquila.checkpoint.published import model_shape
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.verify.huggingface import our_logits

LAYERS, HEADS, D, FFN, VOCAB = 2, 6, 4, 20, 29
HIDDEN = HEADS * D
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
AQUILA = {
    "dim": HIDDEN, "multiple_of": 4, "intermediate_size": FFN, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-5,
    "vocab_size": VOCAB, "max_seq_len": 16,
}  # fmt: skip
BAICHUAN = {
    "model_type": "baichuan", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-6, "vocab_size": VOCAB, "model_max_length": 16,
}  # fmt: skip


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.3


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def aquila_files() -> dict[str, torch.Tensor]:
    files = {"tok_embeddings.weight": drawn(VOCAB, HIDDEN), "norm.weight": 1 + drawn(HIDDEN)}
    files["output.weight"] = drawn(VOCAB, HIDDEN)
    for n in range(LAYERS):
        files |= {f"layers.{n}.attention.{w}.weight": drawn(HIDDEN, HIDDEN) for w in ("wq", "wk", "wv", "wo")}
        files |= {f"layers.{n}.feed_forward.{w}.weight": drawn(FFN, HIDDEN) for w in ("w1", "w3")}
        files[f"layers.{n}.feed_forward.w2.weight"] = drawn(HIDDEN, FFN)
        files |= {f"layers.{n}.{w}.weight": 1 + drawn(HIDDEN) for w in ("attention_norm", "ffn_norm")}
    return files


def aquila_logits(files: dict[str, torch.Tensor]) -> torch.Tensor:
    """FlagAI's network: complex rotation of neighbours, scores clamped to +-1024, Meta's names."""
    angles = torch.outer(torch.arange(8.0), 10000.0 ** -(torch.arange(0, D, 2) / D))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    x = files["tok_embeddings.weight"][TOKENS]
    future = torch.full((8, 8), float("-inf")).triu(1)
    for n in range(LAYERS):
        layer = {name.removeprefix(f"layers.{n}."): weight for name, weight in files.items()}
        y = norm(x, layer["attention_norm.weight"], 1e-5)
        q, k, v = ((y @ layer[f"attention.{w}.weight"].T).view(2, 8, HEADS, D) for w in ("wq", "wk", "wv"))
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(2, 8, HEADS, D // 2, 2)) * turn).flatten(3)
            for z in (q, k)
        )
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / D**0.5).clamp(-1024, 1024) + future
        mixed = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(2, 8, HIDDEN)
        x = x + mixed @ layer["attention.wo.weight"].T
        y = norm(x, layer["ffn_norm.weight"], 1e-5)
        gate = F.silu(y @ layer["feed_forward.w1.weight"].T) * (y @ layer["feed_forward.w3.weight"].T)
        x = x + gate @ layer["feed_forward.w2.weight"].T
    return norm(x, files["norm.weight"], 1e-5) @ files["output.weight"].T


def packed(files: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q, k and v as rows of one tensor."""
    out = {name: weight for name, weight in files.items() if name[-9:-7] not in ("wq", "wk", "wv")}
    for n in range(LAYERS):
        parts = [files[f"layers.{n}.attention.{w}.weight"] for w in ("wq", "wk", "wv")]
        out[f"layers.{n}.attention.Wqkv.weight"] = torch.cat(parts)
    return out


def baichuan_files() -> dict[str, torch.Tensor]:
    files = {"model.embed_tokens.weight": drawn(VOCAB, HIDDEN), "lm_head.weight": drawn(VOCAB, HIDDEN)}
    files["model.norm.weight"] = 1 + drawn(HIDDEN)
    for n in range(LAYERS):
        p = f"model.layers.{n}"
        files[f"{p}.self_attn.W_pack.weight"] = drawn(3 * HIDDEN, HIDDEN)
        files[f"{p}.self_attn.o_proj.weight"] = drawn(HIDDEN, HIDDEN)
        files |= {f"{p}.mlp.{w}_proj.weight": drawn(FFN, HIDDEN) for w in ("gate", "up")}
        files[f"{p}.mlp.down_proj.weight"] = drawn(HIDDEN, FFN)
        files |= {f"{p}.{w}_layernorm.weight": 1 + drawn(HIDDEN) for w in ("input", "post_attention")}
    return files


def baichuan_logits(files: dict[str, torch.Tensor], *, alibi: bool) -> torch.Tensor:
    """The 13B's slopes of 6 heads are 1/4, 1/16, 1/64, 1/256 and then 1/2, 1/8; biases count from the start."""
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    inverse = 1.0 / 10000 ** (torch.arange(0, D, 2) / D)
    table = torch.outer(torch.arange(8.0), inverse).repeat(1, 2)
    x = files["model.embed_tokens.weight"][TOKENS]
    mask = torch.full((8, 8), float("-inf")).triu(1)
    if alibi:
        mask = mask + slopes[:, None, None] * torch.arange(8.0)
    for n in range(LAYERS):
        layer = {name.removeprefix(f"model.layers.{n}."): weight for name, weight in files.items()}
        y = norm(x, layer["input_layernorm.weight"], 1e-6)
        proj = y @ layer["self_attn.W_pack.weight"].T
        q, k, v = (z.view(2, 8, HEADS, D).transpose(1, 2) for z in proj.split(HIDDEN, dim=-1))
        if not alibi:
            q, k = (
                z * table.cos() + torch.cat((-z[..., D // 2 :], z[..., : D // 2]), -1) * table.sin() for z in (q, k)
            )
        mixed = ((q @ k.transpose(2, 3) / D**0.5 + mask).softmax(-1) @ v).transpose(1, 2).reshape(2, 8, HIDDEN)
        x = x + mixed @ layer["self_attn.o_proj.weight"].T
        y = norm(x, layer["post_attention_layernorm.weight"], 1e-6)
        gate = F.silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
        x = x + gate @ layer["mlp.down_proj.weight"].T
    return norm(x, files["model.norm.weight"], 1e-6) @ F.normalize(files["lm_head.weight"]).T


def folder_of(tmp_path: Path, config: dict[str, Any], files: dict[str, torch.Tensor], how: str = "safetensors") -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if how == "safetensors":
        save_file(files, tmp_path / "model.safetensors")
    elif how == "bin":
        torch.save(OrderedDict(files), tmp_path / "pytorch_model.bin")
    else:
        torch.save({"module": files, "step": 3}, tmp_path / "pytorch_model.bin")
    return tmp_path


def error(reader: TensorReader, expected: torch.Tensor) -> float:
    with torch.no_grad():
        ours = our_logits(reader, model_shape(reader), torch.float32, TOKENS)
    return float((ours - expected).abs().max() / expected.abs().max())
