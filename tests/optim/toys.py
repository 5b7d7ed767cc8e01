"""Parameters to lay out and update, without a model."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.parallel.params import Constant, ParamInfo, Part

SHAPES = {"matrix": (7, 9), "norm": (33,), "wide": (20, 13), "bias": (5,), "square": (24, 24)}  # 24 * 24: spans shards


def whole(name: str, value: Tensor, *, weight_decay: bool) -> ParamInfo:
    """A parameter that is one logical tensor, unsplit."""
    shape = tuple(value.shape)
    part = Part(name=name, global_shape=shape, offset=(0,) * len(shape), shape=shape)
    return ParamInfo(param=nn.Parameter(value), stage=0, weight_decay=weight_decay, init=Constant(0.0), parts=(part,))


def draw(shape: Sequence[int], *seed: int) -> Tensor:
    """Float64 values fixed by ``seed``, the same in every process."""
    mixed = sum(s * 1009**i for i, s in enumerate(seed, start=1))
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)


def toy_infos(dtype: torch.dtype) -> list[ParamInfo]:
    """Matrices that decay and vectors that do not."""
    return [
        whole(name, draw(shape, i, 77).to(dtype), weight_decay=len(shape) == 2)
        for i, (name, shape) in enumerate(SHAPES.items())
    ]


def give_gradients(infos: Sequence[ParamInfo], *seed: int, skip: Sequence[str] = ()) -> dict[str, Tensor]:
    """Run a backward whose gradients are ``draw(shape, index, *seed)`` cast to each parameter's type; return them."""
    grads = {
        info.name: draw(info.param.shape, i, *seed).to(info.param.dtype)
        for i, info in enumerate(infos)
        if info.name not in skip
    }
    by_name = {info.name: info.param for info in infos}
    torch.autograd.backward([by_name[name] for name in grads], list(grads.values()))
    return grads


def weights_of(infos: Iterable[ParamInfo], optimizer: DistributedOptimizer) -> dict[str, Tensor]:
    """Copies of the parameters, read one by one: sharded ones do not stay."""
    found = {}
    for info in infos:
        optimizer.wait_for_weights([info.param])
        found[info.name] = info.param.detach().clone()
    return found
