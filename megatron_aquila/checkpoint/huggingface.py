"""Folders of Hugging Face weights of Llama's form, read without transformers; and the files of any."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_aquila.checkpoint.folders import write_text
from megatron_aquila.checkpoint.llama import llama_feature_problems, llama_shape_fields, llama_tensors
from megatron_aquila.checkpoint.manifest import Piece, StoredTensor
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.tensorfile import DTYPES, Entry
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
