"""Weights that other programs keep as pickles, read as tensors and plain values alone: no code in a file is run.

``torch.load(weights_only=True)`` builds nothing but what is listed, and tensors are mapped from the file, so that a
rank's whole state costs no memory until a tensor is copied.
"""

import argparse
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_aquila.errors import CheckpointError


def _number(value: Any = None, *_: Any) -> Any:
    """Stands for the enums in Megatron-LM's arguments: what remains is the number."""
    return value


# Megatron-LM's arguments and random states: a namespace, enums, and numpy's arrays.
_ENUMS = (
    "megatron.core.enums.ModelType",
    "megatron.model.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
)
_RECONSTRUCT = np.empty(0).__reduce__()[0]  # makes an empty array of a type, and nothing else
_ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,
    SimpleNamespace,
    BytesIO,  # Transformer Engine's states
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_number, name) for name in _ENUMS),
)


def load_pickle(path: Path) -> Any:
    """What ``path`` holds. Raises CheckpointError where it cannot be read, or asks for more than values and tensors."""
    try:
        with torch.serialization.safe_globals([*_ALLOWED]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):  # only torch's older form, which is no archive, cannot be mapped
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        said = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
        raise CheckpointError(
            f"{path}: it holds more than tensors and plain values, and its code is not run: {said.strip()}; save its "
            "tensors alone, as safetensors where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: it cannot be read: {str(error).splitlines()[0]}") from error


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, out of the wrapper ``module`` where it has one. Raises CheckpointError."""
    state = load_pickle(path)
    if isinstance(state, Mapping) and isinstance(state.get("module"), Mapping):
        state = state["module"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: it holds a {type(state).__name__}, not a table of tensors")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested tables by the names joined with dots; other values are left out."""
    out: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Tensor):
            out[f"{prefix}{name}"] = value
        elif isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
    return out
