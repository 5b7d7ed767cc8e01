"""Where the tensors of other programs hold ours: one table a format, read in both directions.

A strip is a rectangle with steps. Fused projections, shards of a tensor-parallel rank, padded vocabularies and rotary
pairs in either order are all of them, so that a conversion is copying, exact in every type and one tensor at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_aquila.plan.shape import PositionEmbedding

Load = Callable[[str], Tensor]
Rows: TypeAlias = tuple[range, range]  # ours and theirs, of the same length
_Copy: TypeAlias = tuple[tuple[range, ...], tuple[range, ...]]  # into, of


@dataclass(frozen=True, slots=True)
class Strip:
    """The elements ``ours``, a range a dim, of our tensor ``name`` are ``theirs`` of their tensor ``key``."""

    name: str
    key: str
    ours: tuple[range, ...]
    theirs: tuple[range, ...]


class TensorMap:
    """All strips between a model and a format. ``ours`` and ``theirs`` are the names and shapes on either side.

    Every element of theirs is in at most one strip: the others are padding, zeros when written. Every one of ours is in
    one, or in equal ones where their ranks hold copies.
    """

    def __init__(
        self,
        ours: Mapping[str, tuple[int, ...]],
        theirs: Mapping[str, tuple[int, ...]],
        strips: Iterable[Strip],
    ) -> None:
        self.ours, self.theirs = ours, theirs
        self._by_name: defaultdict[str, dict[str, list[_Copy]]] = defaultdict(dict)
        self._by_key: defaultdict[str, dict[str, list[_Copy]]] = defaultdict(dict)
        for strip in strips:
            self._by_name[strip.name].setdefault(strip.key, []).append((strip.ours, strip.theirs))
            self._by_key[strip.key].setdefault(strip.name, []).append((strip.theirs, strip.ours))

    def our_tensor(self, name: str, load: Load) -> Tensor:
        """Our tensor ``name``, from those of theirs that hold it, each of which ``load`` gives once."""
        return _assembled(self.ours[name], self._by_name[name], load, None)

    def their_tensor(self, key: str, load: Load, out: Tensor | None = None) -> Tensor:
        """Their tensor ``key``, from those of ours that are in it; in ``out``, which is zeros, where that is given."""
        return _assembled(self.theirs[key], self._by_key[key], load, out)

    def sources_of(self, key: str) -> list[str]:
        """Names of ours that are in their tensor ``key``."""
        return [*self._by_key[key]]

    def keys_of(self, name: str) -> list[str]:
        """Their tensors that hold ours called ``name``."""
        return [*self._by_name[name]]


def _assembled(
    shape: tuple[int, ...], sources: Mapping[str, Sequence[_Copy]], load: Load, out: Tensor | None
) -> Tensor:
    for source, copies in sources.items():
        tensor = load(source)
        out = torch.zeros(shape, dtype=tensor.dtype) if out is None else out
        for into, of in copies:
            out[_slices(into)] = tensor[_slices(of)]
        del tensor  # before the next is loaded
    assert out is not None, f"nothing holds a tensor of shape {shape}"
    return out


def _slices(ranges: tuple[range, ...]) -> tuple[slice, ...]:
    return tuple(slice(one.start, one.stop, one.step) for one in ranges)


def whole(name: str, key: str, shape: tuple[int, ...]) -> Strip:
    """Our tensor is theirs under another name."""
    everything = tuple(range(size) for size in shape)
    return Strip(name, key, everything, everything)


def row_strips(name: str, key: str, rows: Iterable[Rows], columns: int) -> Iterator[Strip]:
    """Strips of whole rows."""
    for ours, theirs in rows:
        assert len(ours) == len(theirs), f"{name}: {len(ours)} rows are not {len(theirs)}"
        yield Strip(name, key, (ours, range(columns)), (theirs, range(columns)))


def head_rows(
    num_heads: int,
    head_dim: int,
    *,
    ours: PositionEmbedding,
    theirs: PositionEmbedding,
    our_start: int = 0,
    their_start: int = 0,
) -> Iterator[Rows]:
    """The rows of consecutive heads, in order; or where the two sides pair features otherwise, pair by pair.

    A head's half-split rows (half p, pair i) are the interleaved rows (pair i, half p).
    """
    if ours == theirs or "alibi" in (ours, theirs):
        size = num_heads * head_dim
        yield range(our_start, our_start + size), range(their_start, their_start + size)
        return
    half = head_dim // 2
    for head in range(num_heads):
        our_head, their_head = our_start + head * head_dim, their_start + head * head_dim
        for part in (0, 1):
            split = (part * half, (part + 1) * half, 1)
            neighbours = (part, head_dim, 2)
            mine, other = (split, neighbours) if ours == "rope" else (neighbours, split)
            yield _from(our_head, mine), _from(their_head, other)


def _from(start: int, steps: tuple[int, int, int]) -> range:
    first, stop, step = steps
    return range(start + first, start + stop, step)
