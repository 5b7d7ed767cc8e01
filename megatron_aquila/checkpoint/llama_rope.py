"""Rotary positions in config.json, both ways: ``rope_theta`` and ``rope_scaling``, as transformers reads them."""

from collections.abc import Mapping
from typing import Any

from megatron_aquila.plan.shape import NEEDS_TRAINED_LEN, ModelShape

# What a form's entry must hold beside its factor, where it holds it at all; the model has no other values.
_CONSTANTS: Mapping[str, Mapping[str, float]] = {
    "default": {},
    "linear": {},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def rope_entries(shape: ModelShape) -> dict[str, object]:
    """``rope_theta`` and ``rope_scaling``. The form ntk is a plain one with another base, and is written as that."""
    base, kind = shape.stretched_rope_base, shape.rope_scaling
    if kind in ("none", "ntk"):
        return {"rope_theta": base, "rope_scaling": None}
    # Servers of transformers 4's time read "type", later ones "rope_type".
    entry: dict[str, object] = {"rope_type": kind, "type": kind, "factor": shape.rope_factor}
    if kind in NEEDS_TRAINED_LEN:
        entry["original_max_position_embeddings"] = shape.rope_trained_len
    return {"rope_theta": base, "rope_scaling": entry | dict(_CONSTANTS[kind])}


def rope_fields(config: Mapping[str, Any]) -> dict[str, object]:
    """The fields of ``ModelShape`` that rotary positions fill. Raises KeyError with the name of a missing entry."""
    rope = _rope(config)
    fields: dict[str, object] = {"rope_base": rope.get("rope_theta", 10000.0)}
    if rope["rope_type"] == "default":
        return fields | {"rope_scaling": "none", "rope_factor": 1.0, "rope_trained_len": 1}
    needs_length = rope["rope_type"] in NEEDS_TRAINED_LEN
    return fields | {
        "rope_scaling": rope["rope_type"],
        "rope_factor": rope["factor"],
        "rope_trained_len": rope["original_max_position_embeddings"] if needs_length else 1,
    }


def rope_problems(config: Mapping[str, Any]) -> list[str]:
    """What config.json asks of rotary positions that the model here does not have, a line each."""
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind not in _CONSTANTS:
        return [f"rope scaling is {kind!r}; only {', '.join(_CONSTANTS)} are supported"]
    extras = {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & rope.keys() if kind == "yarn" else set()
    return [
        *(f"rope scaling has {name} {rope[name]!r}; only its default is supported" for name in sorted(extras)),
        *(
            f"rope scaling has {name} {rope[name]!r}; only {value:g} is supported"
            for name, value in _CONSTANTS[kind].items()
            if rope.get(name, value) != value
        ),
    ]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: flat in transformers 4 (``rope_theta``, ``rope_scaling``), ``rope_parameters`` in 5."""
    scaling = dict(config.get("rope_scaling") or {})
    rope = {"rope_type": scaling.pop("type", "default")} | scaling
    if "rope_theta" in config:
        rope["rope_theta"] = config["rope_theta"]
    return rope | (config.get("rope_parameters") or {})
