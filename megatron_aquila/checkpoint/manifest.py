"""``manifest.json``: what a checkpoint holds and in which file each piece is. Text that a person can read and diff.

Format 1::

    {"format": 1, "step": 100,
     "state": {...},
     "files": {"rank_00000.safetensors": {"size": ..., "sha256": "..."}, ...},
     "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [64],
                                       "pieces": [["rank_00000.safetensors", [0], [64]], ...]}, ...},
     "sha256": "..."}

``state`` is all that is not a tensor. A piece is its file, offset and shape. The last hash is that of everything else
here, so that no flipped bit goes unnoticed.

A piece's key in its file is ``name@offset``, e.g. ``model.embed_tokens.weight@128,0``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.tensorfile import DTYPE_NAMES, DTYPES, FileRecord
from megatron_aquila.errors import CheckpointError

FORMAT = 1
Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor and the file and key under which it is stored."""

    file: str
    key: str
    rectangle: Rectangle


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor on disk: its global shape and type, and the pieces that hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The table of contents of one checkpoint."""

    step: int
    state: Mapping[str, Json]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, StoredTensor]

    def render(self) -> str:
        """As text: one line a file, one line a tensor, the state indented."""
        files = {name: {"size": record.size, "sha256": record.sha256} for name, record in self.files.items()}
        tensors = {
            name: {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": tensor.shape,
                "pieces": [[piece.file, piece.rectangle.offset, piece.rectangle.shape] for piece in tensor.pieces],
            }
            for name, tensor in sorted(self.tensors.items())
        }
        body = {"format": FORMAT, "step": self.step, "state": self.state, "files": files, "tensors": tensors}
        body = json.loads(json.dumps(body))  # what a reader will see: a key 7 is "7" there
        lines = [
            f'"format": {FORMAT}',
            f'"step": {self.step}',
            f'"state": {json.dumps(body["state"], indent=1, ensure_ascii=False)}',
            f'"files": {_line_each(files)}',
            f'"tensors": {_line_each(tensors)}',
            f'"sha256": "{_digest(body)}"',
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check. Raises CheckpointError naming the file when it is missing, damaged or of another format."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: it cannot be read: {error.strerror}") from error
        except ValueError as error:  # not UTF-8, or not JSON
            raise CheckpointError(f"{path}: it is damaged: {error}; use another checkpoint") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else None
            raise CheckpointError(
                f"{path}: its format is {found!r}, this program reads format {FORMAT}; use the version that wrote it"
            )
        if body.pop("sha256", None) != _digest(body):
            raise CheckpointError(f"{path}: it is damaged: its text does not match its sha256; use another checkpoint")
        return cls(
            step=body["step"],
            state=body["state"],
            files={name: FileRecord(entry["size"], entry["sha256"]) for name, entry in body["files"].items()},
            tensors={name: _stored_tensor(name, entry) for name, entry in body["tensors"].items()},
        )


def piece_key(name: str, offset: tuple[int, ...]) -> str:
    """The key of a piece in its safetensors file."""
    return f"{name}@{','.join(map(str, offset))}"


def _stored_tensor(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    pieces = tuple(
        Piece(file, piece_key(name, tuple(offset)), Rectangle(tuple(offset), tuple(shape)))
        for file, offset, shape in entry["pieces"]
    )
    return StoredTensor(tuple(entry["shape"]), DTYPES[entry["dtype"]], pieces)


def _line_each(table: Mapping[str, object]) -> str:
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return "{\n " + ",\n ".join(lines) + "\n}"


def _digest(body: Mapping[str, object]) -> str:
    """SHA-256 of the values, however the text is laid out."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
