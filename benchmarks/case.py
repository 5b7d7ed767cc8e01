"""A case of the kernels' benchmark: inputs at a model's sizes, how a kernel is called, and the work it has to do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_aquila.plan.shape import ModelShape

Kernel = Callable[..., Any]
Make = Callable[[], Kernel]  # raises ImportError, AttributeError or ConfigError where the kernel is not to be had


@dataclass(frozen=True, slots=True)
class Size:
    """A microbatch of a model."""

    shape: ModelShape
    seq_len: int
    batch: int


@dataclass(frozen=True, slots=True)
class Work:
    """The least that must be done: bytes to read and write, or floating-point operations."""

    amount: float
    unit: Literal["TB/s", "TFLOP/s"] = "TB/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """``call(kernel, *inputs)`` gives the outputs; gradients are asked for where ``backward`` or ``both`` has work.

    ``op``: its name in the start's list of kernels, whose implementations take part, tried at ``sizes`` beside the
    model's. ``kernels``: those that take part beside them. ``both``: forward and backward as one. ``gradients``: of the
    outputs; default random. ``exact``: outputs in float64, where the reference on widened inputs does not give them,
    for what ``compared`` makes of a kernel's.
    """

    op: str
    reference: Kernel
    inputs: tuple[Tensor, ...]
    call: Callable[..., tuple[Tensor, ...]]
    forward: Work | None = None
    backward: Work | None = None
    both: Work | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Make] = field(default_factory=dict)
    gradients: tuple[Tensor, ...] | None = None
    exact: Callable[[], Sequence[Tensor]] | None = None
    compared: Callable[..., Sequence[Tensor]] | None = None

    @property
    def has_backward(self) -> bool:
        """Whether gradients are asked for."""
        return self.backward is not None or self.both is not None


Cases = Mapping[str, Callable[[Size, torch.device, torch.dtype], Case]]


def draw(device: torch.device, dtype: torch.dtype, *size: int) -> Tensor:
    """Random normal numbers."""
    return torch.randn(size, device=device, dtype=dtype)
