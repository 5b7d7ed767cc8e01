"""The Aquila of 2023 as FlagAI stores it: names of its own, rotary pairs of neighbours, sometimes q, k and v in one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_aquila.checkpoint.llama import (
    NORM_ORDER,
    SpecialIds,
    llama_tensors,
    norm_order_problems,
    renamed_map,
    said_fields,
)
from megatron_aquila.checkpoint.strips import Strip, TensorMap, head_rows, row_strips, whole
from megatron_aquila.plan.shape import ModelShape, ffn_size

SCORE_CLAMP = 1024.0
ROPE_BASE = 10000.0
PACKED = "flash_atten_aquila_style"  # q, k and v are one tensor
_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ENDS = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def aquila_map(shape: ModelShape, *, packed: bool = False) -> TensorMap:
    """Our tensors in FlagAI's; with ``packed`` q, k and v are rows of one ``Wqkv`` in this order."""
    keys = {name: _key(name) for name in llama_tensors(shape)}
    if not packed:
        return renamed_map(shape, keys, "rope-interleaved")
    ours = llama_tensors(shape)
    strips = [strip for name, key in keys.items() for strip in _packed(shape, name, key, ours[name])]
    sizes = {key: ours[name] for name, key in keys.items() if _start(shape, name) is None}
    rows = shape.attention_size + 2 * shape.kv_size
    sizes |= {f"layers.{layer}.attention.Wqkv.weight": (rows, shape.hidden_size) for layer in range(shape.num_layers)}
    return TensorMap(ours, sizes, strips)


def _packed(shape: ModelShape, name: str, key: str, size: tuple[int, ...]) -> Iterator[Strip]:
    start = _start(shape, name)
    if start is None:
        yield whole(name, key, size)
        return
    form, heads = shape.position_embedding, size[0] // shape.head_dim
    theirs = form if ".v_proj" in name else "rope-interleaved"
    rows = head_rows(heads, shape.head_dim, ours=form, theirs=theirs, their_start=start)
    yield from row_strips(name, f"layers.{name.split('.')[2]}.attention.Wqkv.weight", rows, shape.hidden_size)


def _start(shape: ModelShape, name: str) -> int | None:
    """Where a projection's rows begin in ``Wqkv``; None for what is not in it."""
    starts = {"q_proj": 0, "k_proj": shape.attention_size, "v_proj": shape.attention_size + shape.kv_size}
    return starts.get(name.split(".")[-2])


def _key(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"layers.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def aquila_config(shape: ModelShape, dtype: torch.dtype, ids: SpecialIds) -> dict[str, object]:
    """The content of config.json, which says nothing of types and special tokens."""
    return {
        "dim": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "multiple_of": 256,
        "n_heads": shape.num_heads,
        "n_layers": shape.num_layers,
        "norm_eps": shape.norm_eps,
        "vocab_size": shape.vocab_size,
        "max_seq_len": shape.seq_len,
        "initializer_range": shape.init_std,
        PACKED: False,
        NORM_ORDER: shape.norm_order,
    }


def aquila_shape_fields(config: Mapping[str, Any]) -> dict[str, object]:
    """What config.json says of the model, under the names of ``ModelShape``'s fields.

    Raises KeyError with the name of a missing entry.
    """
    hidden, heads = config["dim"], config["n_heads"]
    width = config.get("intermediate_size")
    return {
        "num_layers": config["n_layers"],
        "hidden_size": hidden,
        "ffn_size": ffn_size(hidden, config["multiple_of"]) if width is None else width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "vocab_size": config["vocab_size"],
        "norm_eps": config["norm_eps"],
        "norm_order": "llama",
        "rope_base": ROPE_BASE,
        "position_embedding": "rope-interleaved",
        "score_clamp": SCORE_CLAMP,
        **said_fields(config, {"max_seq_len": "seq_len"}),
    }


def aquila_problems(config: Mapping[str, Any]) -> list[str]:
    """What config.json asks for that the model here does not have, a line each."""
    return norm_order_problems(config)


def aquila_cannot_hold(shape: ModelShape) -> str | None:
    """What of the model these files cannot say."""
    if shape.norm_head:
        return "the head is used as it is stored"
    if shape.position_embedding == "alibi" or shape.num_kv_heads != shape.num_heads:
        return "positions are rotary, and every query head has its own key"
    if shape.attention_size != shape.hidden_size:
        return "the heads fill the hidden size"
    if shape.rope_scaling != "none" or shape.rope_base != ROPE_BASE:
        return f"positions are not stretched, and their base is {ROPE_BASE:g}"
    if shape.score_clamp != SCORE_CLAMP:
        return f"scores are clamped at {SCORE_CLAMP:g}"
    return None
