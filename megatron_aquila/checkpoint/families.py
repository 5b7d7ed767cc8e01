"""The families of published weights: what their tensors are called and how they lie, and their config.json."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from megatron_aquila.checkpoint import aquila_2023, baichuan, llama
from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.strips import TensorMap
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A form of files. ``tensor_map`` takes the shape of the model on our side; the config's functions read and write.

    ``problems``: what a config.json asks for that is not offered here, a line each. ``cannot_hold``: what of a model
    these files cannot say, None if they can all of it.
    """

    name: str
    tensor_map: Callable[[ModelShape], TensorMap]
    config: Callable[[ModelShape, torch.dtype, SpecialIds], dict[str, object]]
    shape_fields: Callable[[Mapping[str, Any]], dict[str, object]]
    problems: Callable[[Mapping[str, Any]], list[str]]
    cannot_hold: Callable[[ModelShape], str | None]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                name="llama",
                tensor_map=llama.llama_map,
                config=llama.llama_config,
                shape_fields=llama.llama_shape_fields,
                problems=llama.llama_feature_problems,
                cannot_hold=llama.llama_cannot_hold,
            ),
            Family(
                name="baichuan2",
                tensor_map=baichuan.baichuan_map,
                config=baichuan.baichuan_config,
                shape_fields=baichuan.baichuan_shape_fields,
                problems=baichuan.baichuan_problems,
                cannot_hold=baichuan.baichuan_cannot_hold,
            ),
            Family(
                name="aquila",
                tensor_map=aquila_2023.aquila_map,
                config=aquila_2023.aquila_config,
                shape_fields=aquila_2023.aquila_shape_fields,
                problems=aquila_2023.aquila_problems,
                cannot_hold=aquila_2023.aquila_cannot_hold,
            ),
        )
    }
)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family whose config.json this is. Raises CheckpointError for one that is not known."""
    if "dim" in config and "n_layers" in config:
        return FAMILIES["aquila"]
    kind = config.get("model_type", "llama")
    if kind == "baichuan":
        return FAMILIES["baichuan2"]
    if kind in ("llama", "aquila"):
        return FAMILIES["llama"]
    raise CheckpointError(f"config.json is of model_type {kind!r}; {', '.join(FAMILIES)} are read")


def family_of_shape(shape: ModelShape) -> Family:
    """The first family whose files can say all of ``shape``. Raises CheckpointError where none can."""
    whys = list(_whys(shape))
    for name, why in whys:
        if why is None:
            return FAMILIES[name]
    raise CheckpointError("no family's files hold this model: " + "; ".join(f"{name}: {why}" for name, why in whys))


def _whys(shape: ModelShape) -> Iterator[tuple[str, str | None]]:
    for name, family in FAMILIES.items():
        yield name, family.cannot_hold(shape)
