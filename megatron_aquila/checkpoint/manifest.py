"""``manifest.json``: what a checkpoint holds and in which file each piece is. Text that a person can read and diff.

Format 1::

    {"format": 1, "step": 100, "saved": 1767225600.0,
     "state": {...},
     "files": {"rank_00000.safetensors": {"size": ..., "sha256": "..."}, ...},
     "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [64],
                                       "pieces": [["rank_00000.safetensors", [0], [64]], ...]}, ...},
     "sha256": "..."}

``saved`` is when, in seconds since 1970; checkpoints of older versions lack it. ``state`` is all that is not a tensor.
A piece is its file, offset and shape. Files are names in the manifest's own folder, never paths. The last hash is that
of everything else here, so that no flipped bit goes unnoticed.

A piece's key in its file is ``name@offset``, e.g. ``model.embed_tokens.weight@128,0``.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.tensorfile import DTYPE_NAMES, DTYPES, FileRecord
from megatron_aquila.errors import CheckpointError

FORMAT = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_ELEMENTS = 2**62
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


class TensorTable:
    """The tensors of a manifest as text, made once for many: they are the same in every checkpoint of a run.

    ``text`` has a line for each.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        table = {
            name: {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": tensor.shape,
                "pieces": [[piece.file, piece.rectangle.offset, piece.rectangle.shape] for piece in tensor.pieces],
            }
            for name, tensor in sorted(tensors.items())
        }
        self.text = _line_each(table)
        self._canonical = _canonical(table)

    def digest_with(self, rest: Mapping[str, object]) -> str:
        """The digest of ``rest`` and the tensors together; its keys come before theirs."""
        assert max(rest) < "tensors", f"{max(rest)} comes behind the tensors"
        text = f'{_canonical(rest)[:-1]},"tensors":{self._canonical}}}'
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The table of contents of one checkpoint."""

    step: int
    state: Mapping[str, Json]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, StoredTensor]
    saved: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(record.size for record in self.files.values())

    @property
    def saved_text(self) -> str:
        """When it was saved, in local time; empty where that is not known."""
        return "" if self.saved == 0 else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.saved))

    def render(self, table: "TensorTable | None" = None) -> str:
        """As text: one line a file, one line a tensor, the state indented. ``table``: that of its tensors."""
        table = TensorTable(self.tensors) if table is None else table
        files = {name: {"size": record.size, "sha256": record.sha256} for name, record in self.files.items()}
        state = json.loads(json.dumps(self.state))  # what a reader will see: a key 7 is "7" there
        rest = {"format": FORMAT, "step": self.step, "saved": self.saved, "state": state, "files": files}
        lines = [
            f'"format": {FORMAT}',
            f'"step": {self.step}',
            f'"saved": {json.dumps(self.saved)}',
            f'"state": {json.dumps(state, indent=1, ensure_ascii=False)}',
            f'"files": {_line_each(files)}',
            f'"tensors": {table.text}',
            f'"sha256": "{table.digest_with(rest)}"',
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check. Raises CheckpointError naming the file when it is missing, damaged or of another format."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            is_whole = isinstance(body, dict) and body.pop("sha256", None) == _digest(body)
        except OSError as error:
            raise CheckpointError(f"{path}: it cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a half surrogate, or too deep
            raise CheckpointError(f"{path}: it is damaged: {error}; use another checkpoint") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else None
            raise CheckpointError(
                f"{path}: its format is {found!r}, this program reads format {FORMAT}; use the version that wrote it"
            )
        if not is_whole:
            raise CheckpointError(f"{path}: it is damaged: its text does not match its sha256; use another checkpoint")
        try:
            return cls._parsed(body)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: no run of ours wrote it: {type(error).__name__}: {error}; use another checkpoint"
            ) from error

    @classmethod
    def _parsed(cls, body: Mapping[str, Any]) -> "Manifest":
        """From JSON whose hash is right: what is still wrong was made on purpose. Raises whatever it stumbles over."""
        files = {_file_name(name): _file_record(entry) for name, entry in body["files"].items()}
        tensors = {name: _stored_tensor(name, entry, files) for name, entry in body["tensors"].items()}
        (step,), saved, state = _counts([body["step"]]), float(body.get("saved", 0.0)), body["state"]
        if not isinstance(state, dict) or not math.isfinite(saved):
            raise ValueError(f"its state is a {type(state).__name__}, its time {saved}")
        return cls(step=step, state=state, files=files, tensors=tensors, saved=saved)


def piece_key(name: str, offset: tuple[int, ...]) -> str:
    """The key of a piece in its safetensors file."""
    return f"{name}@{','.join(map(str, offset))}"


def _file_name(name: str) -> str:
    """Raises ValueError where it could lead out of the folder, or is the manifest's own."""
    if _FILE_NAME.fullmatch(name) is None or name == "manifest.json":
        raise ValueError(f"{name[:80]!r} is not the name of a file in its folder")
    return name


def _file_record(entry: Mapping[str, Any]) -> FileRecord:
    (size,), digest = _counts([entry["size"]]), entry["sha256"]
    if _SHA256.fullmatch(digest) is None:
        raise ValueError(f"{digest[:80]!r} is not a SHA-256")
    return FileRecord(size, digest)


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    """Whole numbers from 0 on, of which nobody's arithmetic overflows."""
    if any(type(value) is not int or not 0 <= value <= _MOST_ELEMENTS for value in values):
        raise ValueError(f"{str(values)[:80]} are not whole numbers from 0 to 2^62")
    return tuple(values)


def _stored_tensor(name: str, entry: Mapping[str, Any], files: Mapping[str, FileRecord]) -> StoredTensor:
    shape, pieces = _counts(entry["shape"]), []
    if not shape:
        raise ValueError(f"{name}: a tensor without dims")
    for file, offset, size in entry["pieces"]:
        rectangle = Rectangle(_counts(offset), _counts(size))
        if len(rectangle.offset) != len(shape) or len(rectangle.shape) != len(shape) or file not in files:
            raise ValueError(f"{name}: a piece at {rectangle.offset} of shape {rectangle.shape} in {str(file)[:80]}")
        pieces.append(Piece(file, piece_key(name, rectangle.offset), rectangle))
    return StoredTensor(shape, DTYPES[entry["dtype"]], tuple(pieces))


def _line_each(table: Mapping[str, object]) -> str:
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return "{\n " + ",\n ".join(lines) + "\n}"


def _digest(body: Mapping[str, object]) -> str:
    """SHA-256 of the values, however the text is laid out."""
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def _canonical(value: Mapping[str, object]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
