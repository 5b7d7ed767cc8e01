"""Megatron's checkpoints as its own code would leave them, written from plain weights without a table of ours.

A layer's fused rows are stacked head by head, ranks are sliced after that, and layers are dealt to the parts in the
order that Megatron's ``get_transformer_layer_offset`` gives: ``chunk * (L / chunks) + pp_rank * (L / parts)``.
"""

import argparse
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from megatron_aquila.plan.shape import ModelShape

Weights = Mapping[str, torch.Tensor]  # by Llama's names
CLASSIC = {
    "qkv": "self_attention.query_key_value.weight", "out": "self_attention.dense.weight",
    "up": "mlp.dense_h_to_4h.weight", "down": "mlp.dense_4h_to_h.weight",
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
}  # fmt: skip
CORE = {
    "qkv": "self_attention.linear_qkv.weight", "out": "self_attention.linear_proj.weight",
    "up": "mlp.linear_fc1.weight", "down": "mlp.linear_fc2.weight",
    "norm1": "self_attention.linear_qkv.layer_norm_weight", "norm2": "mlp.linear_fc1.layer_norm_weight",
}  # fmt: skip
LOCAL = CORE | {"norm1": "input_layernorm.weight", "norm2": "pre_mlp_layernorm.weight"}
LAYER_NAMES = {"classic": CLASSIC, "core": CORE, "core-local": LOCAL}


def layer_of(weights: Weights, shape: ModelShape, number: int, *, patched: bool) -> dict[str, torch.Tensor]:
    """One layer, fused, of all ranks together: ``up`` is [gate; up] apart."""
    own = {key.split(".", 3)[3]: x for key, x in weights.items() if key.startswith(f"model.layers.{number}.")}
    q, k, v = (own[f"self_attn.{name}_proj.weight"].split(shape.head_dim) for name in "qkv")
    if patched:  # FlagScale's 7B: rows of v from neighbours to halves
        v = tuple(torch.cat([head[0::2], head[1::2]]) for head in v)
    per_group = shape.num_heads // shape.num_kv_heads
    rows = []
    for group in range(shape.num_kv_heads):
        rows += [*q[group * per_group : (group + 1) * per_group], k[group], v[group]]
    return {
        "qkv": torch.cat(rows),
        "out": own["self_attn.o_proj.weight"],
        "gate": own["mlp.gate_proj.weight"],
        "up": own["mlp.up_proj.weight"],
        "down": own["mlp.down_proj.weight"],
        "norm1": own["input_layernorm.weight"],
        "norm2": own["post_attention_layernorm.weight"],
    }


def of_rank(layer: Mapping[str, torch.Tensor], tp: int, rank: int) -> dict[str, torch.Tensor]:
    """One tensor-parallel rank's part of it."""
    part = {name: layer[name].chunk(tp)[rank] for name in ("qkv", "gate", "up")}
    return {
        "qkv": part["qkv"].clone(),
        "up": torch.cat([part["gate"], part["up"]]),
        "out": layer["out"].chunk(tp, dim=1)[rank].clone(),
        "down": layer["down"].chunk(tp, dim=1)[rank].clone(),
        "norm1": layer["norm1"].clone(),
        "norm2": layer["norm2"].clone(),
    }


def write_files(
    folder: Path,
    weights: Weights,
    shape: ModelShape,
    *,
    tp: int = 1,
    pp: int = 1,
    chunks: int = 1,
    names: str = "classic",
    rows: int,
    patched: bool = False,
    layers: tuple[int, ...] = (),
    zeros: bool = False,
    **arguments: Any,
) -> Path:
    """Iteration 7 in ``folder``, its vocabulary padded to ``rows`` by its last row, or zeros. ``layers``: of uneven
    parts.
    """
    parts = pp * chunks
    counts = layers or (shape.num_layers // parts,) * parts
    table = {"embed": weights["model.embed_tokens.weight"], "head": weights["lm_head.weight"]}
    table = {name: torch.cat([x, x[-1:].expand(rows - len(x), -1) * (not zeros)]) for name, x in table.items()}
    for rank in range(tp):
        for pp_rank in range(pp):
            state: dict[str, Any] = {"args": namespace(shape, rows, tp, pp, patched, **arguments), "iteration": 7}
            for chunk in range(chunks):
                first = chunk * (shape.num_layers // chunks) + pp_rank * (shape.num_layers // parts)
                if layers:
                    first = sum(layers[: chunk * pp + pp_rank])
                flat: dict[str, Any] = {}
                for local in range(counts[chunk * pp + pp_rank]):
                    fused = of_rank(layer_of(weights, shape, first + local, patched=patched), tp, rank)
                    flat |= {f"layers.{local}.{LAYER_NAMES[names][name]}": x for name, x in fused.items()}
                is_first, is_last = (pp_rank, chunk) == (0, 0), (pp_rank, chunk) == (pp - 1, chunks - 1)
                if is_last:
                    flat["final_layernorm.weight"] = weights["model.norm.weight"].clone()
                embed, head = (table[name].chunk(tp)[rank].clone() for name in ("embed", "head"))
                state["model" if chunks == 1 else f"model{chunk}"] = (
                    classic(flat, embed if is_first else None, head if is_last else None)
                    if names == "classic"
                    else core(flat, embed if is_first else None, head if is_last else None)
                )
            name = f"mp_rank_{rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else "")
            (folder / "iter_0000007" / name).mkdir(parents=True)
            torch.save(state, folder / "iter_0000007" / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def classic(flat: dict[str, Any], embed: torch.Tensor | None, head: torch.Tensor | None) -> dict[str, Any]:
    """Nested tables: the encoder's names are flat."""
    model: dict[str, Any] = {"encoder": flat}
    if embed is not None:
        model["embedding"] = {"word_embeddings": {"weight": embed}}
    if head is not None:
        model["output_layer"] = {"weight": head}
    return {"language_model": model}


def core(flat: dict[str, Any], embed: torch.Tensor | None, head: torch.Tensor | None) -> dict[str, Any]:
    """One table, with states of Transformer Engine between: streams of bytes, tensors of bytes or nothing."""
    model: dict[str, Any] = {f"decoder.{name}": x for name, x in flat.items()}
    model |= {f"decoder.{name.rpartition('.')[0]}._extra_state": BytesIO(b"fp8") for name in flat if "qkv.w" in name}
    model |= {f"decoder.{name.rpartition('.')[0]}._extra_state": None for name in flat if "proj.w" in name}
    if embed is not None:
        model["embedding.word_embeddings.weight"] = embed
    if head is not None:
        model |= {"output_layer.weight": head, "output_layer._extra_state": torch.zeros(3, dtype=torch.uint8)}
    return model


def namespace(shape: ModelShape, rows: int, tp: int, pp: int, patched: bool, **more: Any) -> argparse.Namespace:
    """Megatron's arguments, those that matter."""
    said = {
        "num_layers": shape.num_layers, "hidden_size": shape.hidden_size, "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads, "kv_channels": shape.head_dim, "seq_length": shape.seq_len,
        "group_query_attention": shape.num_kv_heads != shape.num_heads, "num_query_groups": shape.num_kv_heads,
        "layernorm_epsilon": shape.norm_eps, "vocab_size": shape.vocab_size, "padded_vocab_size": rows,
        "rotary_interleaved_patch": patched, "apply_layernorm_rms": True, "swiglu": True, "add_bias_linear": False,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
        "untie_embeddings_and_output_weights": True, "params_dtype": torch.float32,
    }  # fmt: skip
    return argparse.Namespace(**(said | more))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of nested tables by their path; no states of low precision."""
    out: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= leaves(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor) and "_extra_state" not in name:
            out[prefix + name] = value
    return out
