"""A model with a larger vocabulary: its tensors read one by one, embedding and head grown as they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import StoredTensor
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.errors import CheckpointError

VOCABULARY: Final = ("model.embed_tokens.weight", "lm_head.weight")  # the tensors with a row a token


def grown(rows_VH: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """A row for each of ``pieces``: the mean, in float32 or wider, of the old rows that it names; the type is kept.

    A token of one piece, as every old one, has that row's bits. One of no pieces gets the mean of all old rows.
    """
    wide = torch.promote_types(rows_VH.dtype, torch.float32)
    out = rows_VH.new_empty(len(pieces), rows_VH.shape[1])
    for number, olds in enumerate(pieces):
        if len(olds) == 1:
            out[number] = rows_VH[olds[0]]
        else:
            chosen = rows_VH[list(olds)] if olds else rows_VH
            out[number] = chosen.to(wide).mean(0).to(rows_VH.dtype)
    return out


class ResizedReader(TensorReader):
    """``reader`` with the vocabulary of ``pieces``: for each new id the old ids that its token consists of.

    Tensors are read from ``reader`` as they are asked for; one at a time is in memory. Optimizer states have no
    meaning for new rows and are left out.

    Raises:
        CheckpointError: the model's vocabulary is not that of the old tokenizer.
    """

    def __init__(self, reader: TensorReader, pieces: Sequence[Sequence[int]]) -> None:
        self._reader, self._pieces = reader, pieces
        missing = [name for name in VOCABULARY if name not in reader.tensors]
        if missing:
            raise CheckpointError(f"{reader.folder}: it holds no {', '.join(missing)}; there is nothing to resize")
        old_size = reader.tensors[VOCABULARY[0]].shape[0]
        largest = max((number for olds in pieces for number in olds), default=-1)
        if largest >= old_size:
            raise CheckpointError(
                f"{reader.folder}: the model has {old_size} tokens, the old tokenizer at least {largest + 1}; name the "
                "tokenizer that the model was trained with"
            )
        tensors = {
            name: self._resized(stored) if name in VOCABULARY else stored
            for name, stored in reader.tensors.items()
            if not name.startswith("optimizer.")
        }
        super().__init__(reader.folder, tensors, files={})

    def shape_fields(self) -> Mapping[str, object]:
        """The model's, with the new vocabulary."""
        fields = dict(self._reader.shape_fields())
        return fields | {"vocab_size": len(self._pieces)}

    def read_into(self, chunks: Sequence[Chunk], *, cast: bool = False, verify_hash: bool = True) -> None:
        """As ``TensorReader.read_into``; of a tensor that grows all old rows are read."""
        self._check(chunks, cast=cast)
        kept = [chunk for chunk in chunks if chunk.name not in VOCABULARY]
        self._reader.read_into(kept, cast=cast, verify_hash=verify_hash)
        for name in VOCABULARY:
            mine = [chunk for chunk in chunks if chunk.name == name]
            if not mine:
                continue
            whole = grown(self._reader.read(name), self._pieces)
            for chunk in mine:
                place = tuple(slice(a, b) for a, b in zip(chunk.offset, chunk.rectangle.stop, strict=True))
                chunk.tensor.copy_(whole[place])

    def _resized(self, stored: StoredTensor) -> StoredTensor:
        return replace(stored, shape=(len(self._pieces), *stored.shape[1:]), pieces=())  # it is in no file
