"""The table of parameters: the one truth on every parameter, read by init, optimizer, clipping, checkpoint, converters."""

from dataclasses import dataclass

from torch import nn


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
    ``name`` that begins at ``offset`` and has ``shape``. A fused weight has several parts; a padded row belongs to none.
    ``replica`` counts the tensor-parallel ranks that hold the same rectangle: only replica 0 is saved, and counted in
    norms.
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
