"""Baichuan2 in Hugging Face's terms: Llama's names, but q, k and v in one ``W_pack``; the head's rows used at length 1.

Files of the 7B turn rotary pairs half a head apart; the 13B has ALiBi, and says so by nothing but its size: releases
with 32 heads are rotary, those with 40 have slopes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_aquila.checkpoint.llama import (
    LEAVE_OUT_CLAMP,
    SpecialIds,
    llama_config,
    llama_tensors,
    norm_order_problems,
    said_fields,
)
from megatron_aquila.checkpoint.strips import Strip, TensorMap, head_rows, row_strips, whole
from megatron_aquila.plan.shape import ModelShape

ROPE_BASE = 10000.0  # of the 7B; config.json does not say it

ALIBI_HEADS = 40
FORM = "position_embedding"  # our word in config.json, which decides where it is there


def baichuan_map(shape: ModelShape) -> TensorMap:
    """Rows of ``W_pack`` are [q; k; v], each with all heads in order."""
    ours = llama_tensors(shape)
    theirs = {name: size for name, size in ours.items() if _part(name) is None}
    for layer in range(shape.num_layers):
        theirs[_pack(layer)] = (3 * shape.attention_size, shape.hidden_size)
    return TensorMap(ours, theirs, (strip for name in ours for strip in _strips(shape, name, ours[name])))


def _strips(shape: ModelShape, name: str, size: tuple[int, ...]) -> Iterator[Strip]:
    part = _part(name)
    if part is None:
        yield whole(name, name, size)
        return
    start, form = part * shape.attention_size, shape.position_embedding
    order = head_rows(
        shape.num_heads, shape.head_dim, ours=form, theirs=form if part == 2 else "rope", their_start=start
    )
    yield from row_strips(name, _pack(int(name.split(".")[2])), order, shape.hidden_size)


def _part(name: str) -> int | None:
    """0, 1 or 2 for a q, k or v projection."""
    return {"q_proj": 0, "k_proj": 1, "v_proj": 2}.get(name.split(".")[-2])


def _pack(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.W_pack.weight"


def baichuan_config(shape: ModelShape, dtype: torch.dtype, ids: SpecialIds) -> dict[str, object]:
    """The content of config.json. The remote code that it names is not ours: copy it from the published files."""
    unknown = ("attention_bias", "attention_dropout", "mlp_bias", "head_dim", "rope_scaling", "rope_theta")
    config = {name: value for name, value in llama_config(shape, dtype, ids).items() if name not in unknown}
    return config | {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "model_max_length": shape.seq_len,
        "z_loss_weight": shape.max_z_loss,
        FORM: shape.position_embedding,
    }


def baichuan_shape_fields(config: Mapping[str, Any]) -> dict[str, object]:
    """What config.json says of the model, under the names of ``ModelShape``'s fields.

    Raises KeyError with the name of a missing entry.
    """
    heads = config["num_attention_heads"]
    lengths = [config[name] for name in ("model_max_length", "max_position_embeddings") if name in config]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_size": config["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "norm_order": "llama",
        "rope_base": ROPE_BASE,
        FORM: config.get(FORM, "alibi" if heads == ALIBI_HEADS else "rope"),
        "norm_head": True,
        **({"seq_len": lengths[0]} if lengths else {}),
        **said_fields(config, {"z_loss_weight": "max_z_loss"}),
    }


def baichuan_problems(config: Mapping[str, Any]) -> list[str]:
    """What config.json asks for that the model here does not have, a line each."""
    found = {"hidden_act": "silu", "tie_word_embeddings": False}
    problems = [
        f"{name} is {config[name]!r}; only {value!r} is supported"
        for name, value in found.items()
        if config.get(name, value) != value
    ]
    return [*problems, *norm_order_problems(config)]


def baichuan_cannot_hold(shape: ModelShape) -> str | None:
    """What of the model these files cannot say."""
    if not shape.norm_head:
        return "the head's rows have length 1"
    if shape.num_kv_heads != shape.num_heads or shape.attention_size != shape.hidden_size:
        return "every query head has its own key, and they fill the hidden size"
    if shape.position_embedding != "alibi" and (shape.rope_scaling != "none" or shape.rope_base != ROPE_BASE):
        return f"positions are not stretched, and their base is {ROPE_BASE:g}"
    return None if shape.score_clamp is None else f"scores are not clamped; {LEAVE_OUT_CLAMP}"
