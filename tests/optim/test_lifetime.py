"""What an optimizer holds goes with it: hooks on parameters must not keep it, its buckets and its groups for ever."""

import gc
import weakref

import torch
from torch import nn

from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.rules import Sgd
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import Normal, ParamInfo, replicated_part


def test_an_optimizer_is_collected_with_its_parameters():
    ctx = ParallelContext.single()
    param = nn.Parameter(torch.ones(4, 4))
    info = ParamInfo(
        param=param,
        stage=0,
        weight_decay=True,
        init=Normal(1.0),
        parts=(replicated_part("w", (4, 4), ctx.tp),),
    )
    optimizer = DistributedOptimizer([info], ctx, rule=Sgd(), bucket_bytes=1024)
    param.sum().backward()
    [main] = optimizer.main_grads().values()
    assert main.total.sum() == 16, "the hook did not add the gradient"
    gone = weakref.ref(optimizer)
    del optimizer, param, info, main
    gc.collect()
    assert gone() is None
