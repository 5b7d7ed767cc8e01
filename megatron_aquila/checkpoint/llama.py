"""The Llama family in Hugging Face's terms: names of the tensors, and config.json in both directions.

Published Aquila2 weights have exactly these names and shapes under ``model_type: aquila``; exports say ``llama``, which
every tool loads without remote code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch

from megatron_aquila.checkpoint.llama_rope import rope_entries, rope_fields, rope_problems
from megatron_aquila.checkpoint.strips import Strip, TensorMap, head_rows, row_strips, whole
from megatron_aquila.plan.shape import ModelShape, NormOrder, PositionEmbedding

NORM_ORDER: Final = "norm_order"  # our word in config.json, which decides where it is there
LEAVE_OUT_CLAMP: Final = "--drop-score-clamp leaves it out"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """Token ids that generation needs; ``None`` where the tokenizer has no such token. Several may end a text."""

    bos: int | None
    eos: int | Sequence[int] | None
    pad: int | None


def llama_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor, in the order of the network. Vocabulary rows are the real ones."""
    hidden, ffn = shape.hidden_size, shape.ffn_size
    layer = {
        "self_attn.q_proj": (shape.attention_size, hidden),
        "self_attn.k_proj": (shape.kv_size, hidden),
        "self_attn.v_proj": (shape.kv_size, hidden),
        "self_attn.o_proj": (hidden, shape.attention_size),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for number in range(shape.num_layers):
        out |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab_size, hidden)}


def llama_map(shape: ModelShape) -> TensorMap:
    """Our tensors are theirs, but that the files pair rotary features half a head apart."""
    ours = llama_tensors(shape)
    return renamed_map(shape, {name: name for name in ours}, "rope")


def renamed_map(shape: ModelShape, keys: Mapping[str, str], theirs: PositionEmbedding) -> TensorMap:
    """Our tensors under the names ``keys``; q and k in the order of rotary pairs ``theirs``."""
    ours = llama_tensors(shape)
    strips = (strip for name, key in keys.items() for strip in renamed(shape, name, key, ours[name], theirs))
    return TensorMap(ours, {key: ours[name] for name, key in keys.items()}, strips)


def renamed(
    shape: ModelShape, name: str, key: str, size: tuple[int, ...], theirs: PositionEmbedding
) -> Iterator[Strip]:
    """Our tensor ``name`` as the whole of ``key``; q and k in the order of rotary pairs ``theirs``."""
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        yield whole(name, key, size)
        return
    rows = head_rows(heads, shape.head_dim, ours=shape.position_embedding, theirs=theirs)
    yield from row_strips(name, key, rows, shape.hidden_size)


def llama_cannot_hold(shape: ModelShape) -> str | None:
    """What of the model config.json has no word for."""
    if shape.position_embedding == "alibi":
        return "positions are rotary"
    if shape.rope_scaling == "two-range":
        return "positions have one range"
    if shape.norm_head:
        return "the head is used as it is stored"
    return None if shape.score_clamp is None else f"scores are not clamped; {LEAVE_OUT_CLAMP}"


def llama_config(shape: ModelShape, dtype: torch.dtype, ids: SpecialIds) -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": shape.init_std,
        "intermediate_size": shape.ffn_size,
        "max_position_embeddings": shape.seq_len,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        **rope_entries(shape),
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        NORM_ORDER: shape.norm_order,
    }


def llama_shape_fields(config: Mapping[str, Any]) -> dict[str, object]:
    """What config.json says of the model, under the names of ``ModelShape``'s fields; defaults are transformers'.

    Raises KeyError with the name of a missing entry.
    """
    heads = config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    said: dict[str, object] = {"norm_order": "aquila"} if config.get("model_type") == "aquila" else {}
    said |= said_fields(config, {"max_position_embeddings": "seq_len"})
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_size": config["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": config["hidden_size"] // heads if head_dim is None else head_dim,
        "vocab_size": config["vocab_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        **rope_fields(config),
        **said,
        "norm_head": False,
    }


def said_fields(config: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, object]:
    """Fields of ``ModelShape`` that config.json may leave out: those that every family calls the same, and ``more``,
    from their entries to the fields.
    """
    names = {NORM_ORDER: "norm_order", "initializer_range": "init_std", **more}
    return {field: config[name] for name, field in names.items() if config.get(name) is not None}


def norm_order_problems(config: Mapping[str, Any]) -> list[str]:
    """A line where ``norm_order`` is there and is none that is known."""
    orders = get_args(NormOrder)
    if config.get(NORM_ORDER, orders[0]) in orders:
        return []
    return [f"{NORM_ORDER} is {config[NORM_ORDER]!r}; only {' or '.join(map(repr, orders))} is supported"]


def llama_feature_problems(config: Mapping[str, Any]) -> list[str]:
    """What config.json asks for that the model here does not have, a line each."""
    offered: dict[str, tuple[object, ...]] = {
        "model_type": ("llama", "aquila"),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }
    problems = [
        f"{name} is {config[name]!r}; only {' or '.join(map(repr, values))} is supported"
        for name, values in offered.items()
        if name in config and config[name] not in values
    ]
    return [*problems, *norm_order_problems(config), *rope_problems(config)]
