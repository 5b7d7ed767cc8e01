"""Initial weights that depend on the seed and the parameter's name alone, never on the layout."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_aquila.parallel.params import Constant, Normal, ParamInfo
from megatron_aquila.parallel.rng import normal_rectangle


@torch.no_grad()
def initialize_(infos: Iterable[ParamInfo], *, seed: int) -> None:
    """Fill every parameter. Local.

    Rows that belong to no logical tensor (vocabulary padding) are zero and stay so: they get no gradient.
    """
    for info in infos:
        info.param.zero_()
        for part in info.parts:
            rows = info.param[part.local_row : part.local_row + part.shape[0]]
            draw_(rows, info.init, seed=seed, name=part.name, global_shape=part.global_shape, offset=part.offset)


@torch.no_grad()
def draw_(
    x: Tensor, init: Normal | Constant, *, seed: int, name: str, global_shape: tuple[int, ...], offset: tuple[int, ...]
) -> None:
    """Fill a rectangle of the logical tensor ``name``, drawn in fp32 on the CPU and cast once. Local."""
    if isinstance(init, Constant):
        x.fill_(init.value)
    else:
        shape = tuple(x.shape)
        x.copy_(normal_rectangle(name, seed=seed, global_shape=global_shape, offset=offset, shape=shape, std=init.std))
