"""Initial weights that depend on the seed and the parameter's name alone, never on the layout."""

from collections.abc import Iterable

import torch

from megatron_aquila.parallel.params import Constant, ParamInfo
from megatron_aquila.parallel.rng import normal_rectangle


@torch.no_grad()
def initialize_(infos: Iterable[ParamInfo], *, seed: int) -> None:
    """Fill every parameter: each logical tensor's rectangle is drawn in fp32 on the CPU and cast once. Local.

    Rows that belong to no logical tensor (vocabulary padding) are zero and stay so: they get no gradient.
    """
    for info in infos:
        info.param.zero_()
        for part in info.parts:
            rows = info.param[part.local_row : part.local_row + part.shape[0]]
            if isinstance(info.init, Constant):
                rows.fill_(info.init.value)
            else:
                rows.copy_(
                    normal_rectangle(
                        part.name,
                        seed=seed,
                        global_shape=part.global_shape,
                        offset=part.offset,
                        shape=part.shape,
                        std=info.init.std,
                    )
                )
