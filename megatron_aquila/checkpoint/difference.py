"""What two checkpoints do not have in common, whichever layouts wrote them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_aquila.checkpoint.manifest import Json
from megatron_aquila.checkpoint.store import CheckpointReader

_MISSING = "nothing"


def state_differences(first: CheckpointReader, second: CheckpointReader) -> Iterator[str]:
    """A line for the step and each entry of the states that is not the same in both."""
    left, right = ({"step": reader.step, **_flat("", reader.state)} for reader in (first, second))
    for name in sorted(left.keys() | right.keys()):
        values = left.get(name, _MISSING), right.get(name, _MISSING)
        if values[0] != values[1]:
            yield f"{name}: {values[0]} -> {values[1]}"


def _flat(prefix: str, value: Json) -> dict[str, Json]:
    """The leaves of nested tables, under names such as ``train.consumed_samples``."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    inner = [_flat(f"{prefix}.{key}" if prefix else key, entry) for key, entry in value.items()]
    return {name: leaf for part in inner for name, leaf in part.items()}


def tensor_differences(first: CheckpointReader, second: CheckpointReader) -> Iterator[str]:
    """A line for each tensor that is not the same, bit for bit. Holds two whole tensors at a time."""
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        kinds = []
        for reader in (first, second):
            stored = reader.tensors.get(name)
            kinds.append(_MISSING if stored is None else f"{list(stored.shape)} {str(stored.dtype).split('.')[1]}")
        if kinds[0] != kinds[1]:
            yield f"{name}: {kinds[0]} -> {kinds[1]}"
        elif (line := _difference(first.read(name), second.read(name))) is not None:
            yield f"{name}: {line}"


def _difference(left: Tensor, right: Tensor) -> str | None:
    """How far two tensors of one kind are apart; ``None`` where no bit differs."""
    bits = [value.contiguous().view(torch.uint8) for value in (left, right)]
    if torch.equal(*bits):
        return None
    changed = (bits[0].view(-1, left.itemsize) != bits[1].view(-1, left.itemsize)).any(dim=1)
    # in pieces, as float64 takes up to eight times the memory
    pairs = zip(*(torch.split(value.flatten(), 2**22) for value in (left, right)), strict=True)
    far = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max().item()  # NaN stays NaN
    return f"max |difference| {far:.6g}, {int(changed.sum()):,} of {left.numel():,} elements differ"
