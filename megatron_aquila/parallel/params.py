"""The table of parameters: the one truth on every parameter.

Initialisation, optimizer, clipping, checkpoints and converters all read it.
"""

from dataclasses import dataclass

from torch import nn

from megatron_aquila.parallel.context import Group


@dataclass(frozen=True, slots=True)
class Normal:
    """Initial values drawn from N(0, ``std``^2)."""

    std: float


@dataclass(frozen=True, slots=True)
class Constant:
    """Initial values all equal to ``value``."""

    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One logical tensor's rectangle inside a local parameter.

    Rows ``local_row : local_row + shape[0]`` of the parameter (all its columns) hold the rectangle of logical tensor
    ``name`` that begins at ``offset`` and has ``shape``. A fused weight has several parts; a padded row belongs to
    none. ``replica`` counts the tensor-parallel ranks that hold the same rectangle: only replica 0 is saved, and
    counted in norms.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    local_row: int = 0
    replica: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamInfo:
    """What there is to know of one local parameter.

    ``sums_over_tp``: each tensor-parallel rank's gradient is a partial sum (a norm weight under sequence parallel); the
    optimizer all-reduces it over tp before anything else reads it.
    """

    param: nn.Parameter
    stage: int
    weight_decay: bool
    init: Normal | Constant
    parts: tuple[Part, ...]
    sums_over_tp: bool = False

    @property
    def name(self) -> str:
        """Names of the logical tensors inside, joined: the parameter's name in messages."""
        return "+".join(part.name for part in self.parts)


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Elements ``start : stop`` of ``info.param`` flattened: what one rank of a sharded optimizer owns of it."""

    info: ParamInfo
    start: int
    stop: int


def replicated_part(name: str, shape: tuple[int, ...], tp: Group) -> Part:
    """A tensor that every rank of ``tp`` holds in full, e.g. a norm's weight."""
    return Part(name=name, global_shape=shape, offset=(0,) * len(shape), shape=shape, replica=tp.rank)


def column_part(name: str, global_shape: tuple[int, int], tp: Group, *, local_row: int = 0) -> Part:
    """This rank's rows of a weight split along its output features (dim 0), at ``local_row`` of the parameter."""
    rows = _share(name, global_shape[0], tp)
    return Part(
        name=name,
        global_shape=global_shape,
        offset=(tp.rank * rows, 0),
        shape=(rows, global_shape[1]),
        local_row=local_row,
    )


def row_part(name: str, global_shape: tuple[int, int], tp: Group) -> Part:
    """This rank's columns of a weight split along its input features (dim 1)."""
    columns = _share(name, global_shape[1], tp)
    return Part(name=name, global_shape=global_shape, offset=(0, tp.rank * columns), shape=(global_shape[0], columns))


def vocab_part(name: str, global_shape: tuple[int, int], padded_vocab_size: int, tp: Group) -> Part:
    """This rank's real rows of a weight with a row a token, padded to ``padded_vocab_size`` rows and split over ``tp``.

    ``global_shape`` has the real rows only. A rank that holds nothing but padding gets a part of 0 rows.
    """
    rows = _share(name, padded_vocab_size, tp)
    start, stop = (min(rank * rows, global_shape[0]) for rank in (tp.rank, tp.rank + 1))
    return Part(name=name, global_shape=global_shape, offset=(start, 0), shape=(stop - start, global_shape[1]))


def _share(name: str, size: int, tp: Group) -> int:
    assert size % tp.size == 0, f"{name}: {size} does not split over {tp.size} ranks"
    return size // tp.size
