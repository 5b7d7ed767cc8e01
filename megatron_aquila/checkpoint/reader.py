"""Filling any rectangles of logical tensors from the pieces that some other layout wrote."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import Piece, StoredTensor
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.tensorfile import DTYPES, FileRecord, file_sha256
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import Group
from megatron_aquila.plan.shape import ModelShape

# Two models that differ in one of these compute different functions; the others are layout, start or length of a run.
_SAME_MODEL = (
    "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
    "norm_eps", "norm_order", "position_embedding", "score_clamp", "norm_head",
)  # fmt: skip
_SAME_POSITIONS = ("rope_base", "rope_scaling", "rope_factor", "rope_trained_len")


class TensorReader(ABC):
    """Logical tensors in a folder of safetensors files.

    ``tensors`` says what is there; ``files`` the size and hash of each file, where the format records them.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], files: Mapping[str, FileRecord]) -> None:
        self.folder = folder
        self.tensors = tensors
        self.files = files
        self._verified: set[str] = set()

    @abstractmethod
    def shape_fields(self) -> Mapping[str, object]:
        """What the folder says of its model, under the names of ``ModelShape``'s fields."""

    def guessed_fields(self) -> Mapping[str, object]:
        """What is taken for fields that ``shape_fields`` lacks, unless somebody knows better."""
        return {"seq_len": 2048, "norm_order": "llama"}

    def shape_problems(self, shape: ModelShape, *, same_positions: bool = True) -> list[str]:
        """Why its tensors are not those of a model of ``shape``, a line each; empty when they are.

        Unless ``same_positions``, rotary positions may differ: to train on with longer samples.
        """
        found = self.shape_fields()
        compared = _SAME_MODEL + (_SAME_POSITIONS if same_positions else ())
        return [
            f"{name} is {found[name]} there, {getattr(shape, name)} in this run"
            for name in compared
            if name in found and found[name] != getattr(shape, name)
        ]

    def read_into(self, chunks: Sequence[Chunk], *, cast: bool = False, verify_hash: bool = True) -> None:
        """Fill every chunk's tensor in place, whatever layout wrote the pieces. Local: nothing is communicated.

        Only the bytes that are needed are read, through mmap; a file is hashed the first time it is touched.
        ``cast`` lets the types differ. Raises CheckpointError naming every tensor that is missing, of another shape or
        of another type before anything is filled; or the file that is missing, truncated or damaged.
        """
        self._check(chunks, cast=cast)
        wanted: defaultdict[str, list[tuple[Piece, Chunk, Rectangle]]] = defaultdict(list)
        for chunk in chunks:
            found = 0
            for piece in self.tensors[chunk.name].pieces:
                common = piece.rectangle.intersection(chunk.rectangle)
                if common is not None:
                    wanted[piece.file].append((piece, chunk, common))
                    found += common.numel
            if found != chunk.tensor.numel():
                raise CheckpointError(
                    f"{self.folder}: of {chunk.name} it holds {found} of the {chunk.tensor.numel()} elements that are "
                    "needed here; use another checkpoint"
                )
        for file, copies in sorted(wanted.items()):
            if verify_hash:
                self._verify(file)
            self._copy(file, copies)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One whole logical tensor on the CPU, as stored or rounded to ``dtype``, which takes no more memory than that.

        Raises CheckpointError as ``read_into``.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: it holds no tensor {name}")
        stored = self.tensors[name]
        out = torch.empty(stored.shape, dtype=stored.dtype if dtype is None else dtype)
        self.read_into([Chunk(name, stored.shape, (0,) * len(stored.shape), out)], cast=dtype is not None)
        return out

    def verify_files(self, group: Group) -> None:
        """Hash every file once in the whole group instead of once a process. Collective: all-gather of the outcomes.

        Raises CheckpointError on every rank when one file is missing or damaged.
        """

        def verify_mine() -> None:
            for file in sorted(self.files)[group.rank :: group.size]:
                self._verify(file)

        together(verify_mine, group)
        self._verified.update(self.files)

    def verify_here(self) -> None:
        """Hash every file. Local. Raises CheckpointError naming one that is missing or damaged."""
        for file in sorted(self.files):
            self._verify(file)

    def _check(self, chunks: Sequence[Chunk], *, cast: bool) -> None:
        problems: dict[str, None] = {}
        for chunk in chunks:
            stored = self.tensors.get(chunk.name)
            if stored is None:
                problems[f"{chunk.name} is not in it"] = None
            elif stored.shape != chunk.global_shape:
                problems[f"{chunk.name} has shape {stored.shape}, the model needs {chunk.global_shape}"] = None
            elif stored.dtype != chunk.tensor.dtype and not cast:
                problems[f"{chunk.name} is {stored.dtype}, the model needs {chunk.tensor.dtype}"] = None
        if problems:
            shown = [*problems][:8]
            rest = len(problems) - len(shown)
            more = f"\n  and {rest} more" if rest else ""
            listing = "\n  ".join(shown)
            raise CheckpointError(f"{self.folder}: it does not fit the model:\n  {listing}{more}")

    def _verify(self, file: str) -> None:
        record = self.files.get(file)
        if record is None or file in self._verified:
            return
        path = self.folder / file
        try:
            size = path.stat().st_size
            digest = file_sha256(path) if size == record.size else ""
        except OSError as error:
            raise CheckpointError(f"{path}: it cannot be read: {error.strerror}; use another checkpoint") from error
        if size != record.size:
            raise CheckpointError(f"{path}: it has {size} bytes instead of {record.size}; use another checkpoint")
        if digest != record.sha256:
            raise CheckpointError(f"{path}: it is damaged: its sha256 is {digest}, not {record.sha256}")
        self._verified.add(file)

    def _copy(self, file: str, copies: Sequence[tuple[Piece, Chunk, Rectangle]]) -> None:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as tensors:
                for piece, chunk, common in copies:
                    source = tensors.get_slice(piece.key)
                    found = (DTYPES.get(source.get_dtype()), tuple(source.get_shape()))
                    stored = (self.tensors[chunk.name].dtype, piece.rectangle.shape)
                    if found != stored:
                        raise CheckpointError(
                            f"{path}: {piece.key} is {found} in it, {stored} in the table of contents"
                        )
                    chunk.tensor[common.within(chunk.rectangle)].copy_(source[common.within(piece.rectangle)])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: it cannot be read: {error}") from error
