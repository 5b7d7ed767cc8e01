"""Through the host's memory the same bits travel: over every collective and message of a step."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aquila.parallel import collectives
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.staging import Transfer, staged, through_host
from megatron_aquila.pipeline import wire
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.train.test_graphs import small, steps

Pools = Callable[[int], WorkerPool]


@contextmanager
def all_staged() -> Iterator[Counter[str]]:
    """Every transfer of this process goes over copies, as a GPU's through gloo; how many do, by group."""
    counts: Counter[str] = Counter()

    def count(begin: Transfer, group: Group) -> Transfer:
        counts[group.name] += 1
        return through_host(begin)

    with mock.patch.object(collectives, "staged", count), mock.patch.object(wire, "staged", count):
        yield counts


def alike(parallel: dict[str, Any], global_batch: int) -> tuple[list[bool], list[str]]:
    """Of each of three steps whether all that it leaves is the same; and which groups carried something."""
    config = small(parallel=parallel, global_batch=global_batch, precision="fp32")
    right = steps(config, warm_up=None)
    with all_staged() as counts:
        found = steps(config, warm_up=None)
    same = [all(map(torch.equal, one, other)) for one, other in zip(right, found, strict=True)]
    return same, sorted(counts)


@pytest.mark.parametrize(
    ("parallel", "groups"),
    [
        ({"tensor": 2, "sequence": True, "pipeline": 2}, {"tp", "pp_link", "world"}),
        ({"context": 2, "data": 2, "zero": 3}, {"cp", "dp_cp", "world"}),
        ({"context": 2, "context_method": "ulysses", "deterministic_reduce": True}, {"cp", "dp_cp", "world"}),
    ],
    ids=str,
)
def test_no_bit_changes(pool: Pools, parallel: dict[str, Any], groups: set[str]) -> None:
    world = (
        parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1) * parallel.get("data", 1)
    )
    for same, carried in pool(world).run(alike, parallel, 4 * parallel.get("data", 1)):
        assert same == [True] * 3
        assert groups <= set(carried)


def test_only_where_the_backend_cannot_read_the_device() -> None:
    group = Group("tp", 0, 2, (0, 1), None)
    assert staged(dist.all_reduce, group) is dist.all_reduce
    assert staged(dist.all_reduce, replace(group, through_host=True)) is not dist.all_reduce


def on_gpu() -> bool:
    """What two ranks on one GPU sum, gather and pass on through gloo. Runs in a worker."""
    device = torch.device("cuda", 0)
    ctx = ParallelContext.create(RankGrid(tp=2), device, timedelta(seconds=60))
    x = torch.full((4,), ctx.rank + 1.0, device=device, dtype=torch.bfloat16)
    found: list[Tensor] = [
        collectives.all_gather(x, ctx.tp),
        collectives.reduce_scatter(x, ctx.tp),
        collectives.begin_pass_on(x, ctx.tp, overlap=True).wait(),
        collectives.all_to_all(x, ctx.tp),
        collectives.all_reduce_(x, ctx.tp),
    ]
    expected = [[1.0] * 4 + [2.0] * 4, [3.0] * 2, [2.0 - ctx.rank] * 4, [1.0, 1.0, 2.0, 2.0], [3.0] * 4]
    assert ctx.tp.through_host, "gloo reads no GPU"
    return all(y.device == device for y in found) and [y.tolist() for y in found] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_share_a_gpu(pool: Pools) -> None:
    assert pool(2).run(on_gpu) == [True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_carries_what_is_asked_of_it() -> None:
    """In a world of one: each collective and its asynchronous form, beside gloo's, and within a recorded graph."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)  # type: ignore[attr-defined]
    try:
        x, out = torch.arange(4.0, device=device), torch.empty(4, device=device)
        assert dist.get_backend(dist.new_group([0], backend="gloo")) == "gloo"
        gather, scatter = collectives._all_gather_single, collectives._reduce_scatter_single
        for launch in (gather, scatter, dist.all_to_all_single):
            launch(out.zero_(), x)
            assert torch.equal(out, x)
            launch(out.zero_(), x, async_op=True).wait()
            assert torch.equal(out, x)
        dist.all_reduce(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            gather(out, x)
        x += 1
        graph.replay()
        assert torch.equal(out, x)
    finally:
        dist.destroy_process_group()
