"""Which parameters share a bucket, and where in it they lie. Arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_aquila.parallel.params import FlatRange, ParamInfo

ALIGNMENT = 64  # elements; 128 bytes of bf16, so that every weight and every shard begins where fast kernels want it


@dataclass(frozen=True, slots=True)
class Slot:
    """``info``'s parameter, flattened, from element ``offset`` of its bucket."""

    info: ParamInfo
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's share of one parameter: ``flat`` of it, which lies at ``start : stop`` of the rank's shard."""

    flat: FlatRange
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketLayout:
    """Parameters of one type, stage and decay setting, one behind the other, the last of the model first.

    What is between and behind them is padding. ``sums_over_tp``: their gradients are partial sums over tp.
    ``num_shards`` shards of ``shard_size`` elements, one a rank of a group that shares them out; their borders may lie
    inside a parameter.
    """

    dtype: torch.dtype
    weight_decay: bool
    sums_over_tp: bool
    slots: tuple[Slot, ...]
    num_shards: int
    shard_size: int

    @property
    def size(self) -> int:
        """Elements of the whole bucket."""
        return self.num_shards * self.shard_size

    def pieces(self, shard: int) -> list[Piece]:
        """What lies in ``shard``, in order."""
        begin, end = shard * self.shard_size, (shard + 1) * self.shard_size
        pieces = []
        for slot in self.slots:
            start, stop = max(begin, slot.offset), min(end, slot.offset + slot.info.param.numel())
            if start < stop:
                flat = FlatRange(slot.info, start - slot.offset, stop - slot.offset)
                pieces.append(Piece(flat, start - begin, stop - begin))
        return pieces


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of gradient sums, master weights and moments for parameters of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def plan_buckets(
    infos: Sequence[ParamInfo], *, bucket_bytes: int, num_shards: int, num_copies: int = 1
) -> list[BucketLayout]:
    """Buckets of ``bucket_bytes`` of gradients, or one larger parameter, in the order in which backward completes them.

    ``infos`` are in forward order. Backward comes from the end, so buckets are filled from there, and one is complete
    with the foremost of its parameters; the last to come is then the partly filled one. Partial sums over tp, which
    wait for that sum, come last of all. No bucket holds parameters of two stages: their backwards lie apart. A shard
    splits into ``num_copies`` pieces, so that a bucket is as large however its replicas share it out.
    """
    assert bucket_bytes > 0, f"a bucket needs room, got {bucket_bytes} bytes"
    place = {id(info): index for index, info in enumerate(infos)}
    groups: dict[tuple[torch.dtype, bool, bool, int], list[ParamInfo]] = {}
    for info in reversed(infos):
        groups.setdefault((info.param.dtype, info.weight_decay, info.sums_over_tp, info.stage), []).append(info)
    layouts = []
    for (dtype, weight_decay, sums_over_tp, _), members in groups.items():
        for slots, size in _fill(members, bucket_bytes // main_dtype(dtype).itemsize):
            layout = BucketLayout(
                dtype=dtype,
                weight_decay=weight_decay,
                sums_over_tp=sums_over_tp,
                slots=slots,
                num_shards=num_shards,
                shard_size=num_copies * _aligned(-(-size // (num_shards * num_copies))),
            )
            layouts.append(layout)
    return sorted(layouts, key=lambda layout: (layout.sums_over_tp, -place[id(layout.slots[-1].info)]))


def _fill(infos: Sequence[ParamInfo], limit: int) -> list[tuple[tuple[Slot, ...], int]]:
    """``infos`` in runs of at most ``limit`` elements (or one parameter), each with its slots and its size."""
    runs: list[tuple[tuple[Slot, ...], int]] = []
    slots: list[Slot] = []
    size = 0
    for info in infos:
        if slots and size + info.param.numel() > limit:
            runs.append((tuple(slots), size))
            slots, size = [], 0
        slots.append(Slot(info, size))
        size = _aligned(size + info.param.numel())
    return [*runs, (tuple(slots), size)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
