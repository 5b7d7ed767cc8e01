"""What distinguishes the model families, on the small models of tests."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_aquila.config.schema import RunConfig

AQUILA = {"position_embedding": "rope-interleaved", "score_clamp": 1024.0, "norm_order": "llama", "num_kv_heads": None}
LLAMA = {"norm_order": "llama"}
BAICHUAN_7B = {"norm_head": True, "max_z_loss": 2e-4, "norm_order": "llama", "num_kv_heads": None}
TWO_RANGE = {"rope_scaling": "two-range", "rope_factor": 4.0}
BAICHUAN_13B = {**BAICHUAN_7B, "position_embedding": "alibi"}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "aquila": AQUILA,
    "llama": LLAMA,
    "baichuan2-7b": BAICHUAN_7B,
    "baichuan2-13b": BAICHUAN_13B,
}


def of_family(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """``config`` with the settings of a family's model."""
    return replace(config, model=replace(config.model, **settings))
