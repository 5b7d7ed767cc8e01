"""Folders of Hugging Face weights: published ones in, our checkpoints out. Needs no transformers."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_aquila.checkpoint.folders import staged_folder, write_text
from megatron_aquila.checkpoint.llama import (
    SpecialIds,
    llama_config,
    llama_feature_problems,
    llama_shape_fields,
    llama_tensors,
)
from megatron_aquila.checkpoint.manifest import Piece, StoredTensor
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.tensorfile import DTYPES, Entry, write_tensors
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape

_SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HuggingFaceReader(TensorReader):
    """Published weights of the Llama form: ``config.json`` and one or several safetensors files.

    Raises CheckpointError when a file is missing or damaged, or when the weights are pickles.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder; name one with config.json and safetensors")
        self.config = read_json(folder / "config.json")
        tensors: dict[str, StoredTensor] = {}
        for file in weight_files(folder):
            tensors |= read_table(folder / file)
        super().__init__(folder, tensors, files={})

    def shape_fields(self) -> Mapping[str, object]:
        """What config.json says. Raises CheckpointError when an entry is missing."""
        try:
            return llama_shape_fields(self.config)
        except KeyError as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: it has no entry {error}; not a Llama model"
            ) from error

    def shape_problems(self, shape: ModelShape, *, same_positions: bool = True) -> list[str]:
        """Also what the model here does not offer, and tensors that have no place in it."""
        features = llama_feature_problems(self.config)
        if features:
            return features
        # Old exports carry rope's frequencies, which follow from its base.
        names = {name for name in self.tensors if not name.endswith("rotary_emb.inv_freq")}
        strangers = sorted(names - llama_tensors(shape).keys())
        return [
            *super().shape_problems(shape, same_positions=same_positions),
            *(f"{name} has no place in the model" for name in strangers),
        ]


def export_huggingface(
    reader: TensorReader,
    out_dir: Path,
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    ids: SpecialIds,
    max_shard_bytes: int = 5 * 10**9,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the model as ``out_dir`` with config.json, generation_config.json, safetensors shards and their index.

    Tensors are read, cast to ``dtype`` and written one by one. ``finish`` is given the complete folder under its
    temporary name, to add a tokenizer or to check it; when it or anything else raises, nothing is left. Raises
    CheckpointError when ``out_dir`` exists, a tensor is missing or of another shape, or a value is not finite.
    """
    names = llama_tensors(shape)
    for name, size in names.items():
        found = reader.tensors[name].shape if name in reader.tensors else None
        if found != size:
            raise CheckpointError(f"{reader.folder}: {name} has shape {found}, a model of this shape needs {size}")
    entries = [Entry(name, dtype, size, partial(_load, reader, name, dtype)) for name, size in names.items()]
    shards = list(shards_of(entries, max_shard_bytes))
    with staged_folder(out_dir) as folder:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / file, shard, metadata={"format": "pt"})
            weight_map |= {entry.key: file for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(folder / "config.json", llama_config(shape, dtype, ids))
        special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
        write_json(folder / "generation_config.json", special)
        if finish is not None:
            finish(folder)


def _load(reader: TensorReader, name: str, dtype: torch.dtype) -> Tensor:
    tensor = reader.read(name).to(dtype)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{reader.folder}: {name} has values that are not finite in {dtype}; choose a wider type")
    return tensor


def shards_of(entries: list[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    """Entries in order, split so that a shard has at most ``max_bytes`` unless one tensor alone has more."""
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(one.num_bytes for one in shard) + entry.num_bytes > max_bytes:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: those of the index, or the single one."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: it has no weight_map; download it again")
        return sorted({Path(file).name for file in weight_map.values()})
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a run does not start from pickled weights; convert them first: "
            "aquila convert --from DIR --to NEW_DIR"
        )
    raise CheckpointError(f"{folder}: it holds neither {_SINGLE} nor {INDEX}")


def read_table(path: Path) -> dict[str, StoredTensor]:
    """What one file holds, from its header."""
    out: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                source = tensors.get_slice(name)
                shape, dtype = tuple(source.get_shape()), source.get_dtype()
                if dtype not in DTYPES:
                    raise CheckpointError(f"{path}: {name} is of type {dtype}; only {', '.join(DTYPES)} are supported")
                whole = Rectangle((0,) * len(shape), shape)
                out[name] = StoredTensor(shape, DTYPES[dtype], (Piece(path.name, name, whole),))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: it cannot be read: {error}; download it again") from error
    return out


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises CheckpointError where it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: it is not a JSON object; download it again")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write an object under a temporary name and rename it. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
