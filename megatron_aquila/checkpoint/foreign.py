"""Weights of other programs as logical tensors of ours, whatever their names, order and files."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

from safetensors import safe_open
from torch import Tensor

from megatron_aquila.checkpoint.huggingface import INDEX, read_json, read_table, weight_files
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import StoredTensor
from megatron_aquila.checkpoint.pickles import tensors_of
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.strips import TensorMap
from megatron_aquila.errors import CheckpointError

Fields = Mapping[str, object]
# tables that follow from the settings, and states of low precision: in some files, and no part of a model
NO_WEIGHTS: Final = ("inv_freq", "freqs_cis", "rope.freqs", "_mask", "_extra_state")


class ForeignReader(TensorReader):
    """``theirs`` gives each tensor of the files by its key, and ``found`` their shapes and types. ``fields`` is what
    they say of the model, ``guessed`` what is likely where they do not.

    Raises CheckpointError when a tensor of the map is missing or of another shape, or one of theirs is not in the map.
    """

    def __init__(
        self,
        folder: Path,
        tensor_map: TensorMap,
        fields: Fields,
        *,
        found: Mapping[str, StoredTensor],
        theirs: Callable[[str], Tensor],
        guessed: Fields = MappingProxyType({}),
    ) -> None:
        wrong = [
            f"{key} has shape {found[key].shape if key in found else None}, the model needs {shape}"
            for key, shape in tensor_map.theirs.items()
            if key not in found or found[key].shape != shape
        ]
        strangers = found.keys() - tensor_map.theirs.keys()
        wrong += [f"{key} has no place in the model" for key in sorted(strangers) if not key.endswith(NO_WEIGHTS)]
        if wrong:
            more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise CheckpointError(f"{folder}: it does not fit its own description:\n  " + "\n  ".join(wrong[:8]) + more)
        tensors = {
            name: StoredTensor(shape, found[tensor_map.keys_of(name)[0]].dtype, ())
            for name, shape in tensor_map.ours.items()
        }
        super().__init__(folder, tensors, files={})
        self.tensor_map, self._fields, self._guessed = tensor_map, fields, guessed
        self._load = lru_cache(maxsize=1)(theirs)  # q, k and v come one after the other out of one tensor

    def shape_fields(self) -> Fields:
        """What the folder says of its model."""
        return self._fields

    def guessed_fields(self) -> Fields:
        """What is likely of the rest."""
        return {**super().guessed_fields(), **self._guessed}

    def read_into(self, chunks: Sequence[Chunk], *, cast: bool = False, verify_hash: bool = True) -> None:
        """As ``TensorReader``'s, a whole logical tensor in memory at a time. Local."""
        self._check(chunks, cast=cast)
        for chunk in chunks:
            ours = self.tensor_map.our_tensor(chunk.name, self._load)
            everything = Rectangle((0,) * ours.dim(), tuple(ours.shape))
            chunk.tensor.copy_(ours[chunk.rectangle.within(everything)])


def open_tables(folder: Path) -> tuple[dict[str, StoredTensor], Callable[[str], Tensor]]:
    """Shapes and types of all tensors in a folder's safetensors or pickled files, and a way to load each.

    Raises CheckpointError where there are none, or one cannot be read.
    """
    pickles = _pickles(folder)
    if not pickles:
        found: dict[str, StoredTensor] = {}
        for file in weight_files(folder):
            found |= read_table(folder / file)
        return found, partial(_from_safetensors, folder, found)
    tensors: dict[str, Tensor] = {}
    for path in pickles:
        tensors |= tensors_of(path)  # mapped, not read
    return {name: StoredTensor(tuple(x.shape), x.dtype, ()) for name, x in tensors.items()}, tensors.__getitem__


def _from_safetensors(folder: Path, found: Mapping[str, StoredTensor], key: str) -> Tensor:
    with safe_open(folder / found[key].pieces[0].file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _pickles(folder: Path) -> list[Path]:
    """Pickled weights where nothing better is there: those of the index, or all of the folder."""
    if (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
        return []
    for index in sorted(folder.glob("*.bin.index.json")):
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{index}: it has no weight_map; download it again")
        return [folder / name for name in sorted({Path(str(file)).name for file in files.values()})]
    return sorted(path for ending in ("*.bin", "*.pth", "*.pt") for path in folder.glob(ending))
