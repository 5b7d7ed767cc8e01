"""Masters and moments on the host: the same updates bit for bit, in memory of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aquila.optim.buckets import Bucket, Reduction, Sharding, Storage
from megatron_aquila.optim.distributed import DistributedOptimizer, Offload
from megatron_aquila.optim.host import Host
from megatron_aquila.optim.rules import AdamW, Rule, Sgd
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.optim.toys import give_gradients, toy_infos, weights_of

Pools = Callable[[int], WorkerPool]
ADAMW = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
NARROW = Storage(moments=torch.bfloat16, has_remainders=True)
MICROBATCHES = 2


def make(dp: int, share: float, dtype: torch.dtype, rule: Rule = ADAMW, **settings: Any) -> Any:
    """Parameters and an optimizer with many buckets, ``share`` of it on the host."""
    ctx = ParallelContext.create(RankGrid(dp=dp), torch.device("cpu"))
    infos = toy_infos(dtype)
    offload = None if share == 0 else Offload(share=share, rule=rule)
    settings = {"reduction": Reduction(overlap=True)} | settings
    optimizer = DistributedOptimizer(infos, ctx, rule=rule, bucket_bytes=1000, offload=offload, **settings)
    optimizer.refresh_masters()
    return infos, optimizer


def step(infos: list[ParamInfo], optimizer: DistributedOptimizer, number: int, *, scale: float = 1.0) -> None:
    optimizer.begin_step(MICROBATCHES)
    for microbatch in range(MICROBATCHES):
        optimizer.wait_for_weights([info.param for info in infos])
        give_gradients(infos, number, microbatch)
    optimizer.reduce_gradients()
    optimizer.step(0.01, optimizer.clip(1.0, loss_scale=scale))


def state_of(infos: list[ParamInfo], optimizer: DistributedOptimizer) -> dict[str, Tensor]:
    """All that a step changes."""
    found = {f"{kind} {flat.info.name}@{flat.start}": view.clone() for kind, flat, view in optimizer.ranges()}
    return found | weights_of(infos, optimizer)


def train(dp: int, share: float, dtype: torch.dtype, rule: Rule, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """After three steps, the second of which does not apply."""
    infos, optimizer = make(dp, share, dtype, rule, **settings)
    for number in range(3):
        step(infos, optimizer, number, scale=0.0 if number == 1 else 1.0)
    assert optimizer.applied_steps == 2
    return state_of(infos, optimizer)


CASES: list[tuple[int, torch.dtype, Rule, dict[str, Any]]] = [
    (1, torch.float64, ADAMW, {}),
    (2, torch.float32, ADAMW, {}),
    (2, torch.float32, Sgd(weight_decay=0.1), {}),
    (2, torch.bfloat16, ADAMW, {}),
    (2, torch.bfloat16, ADAMW, {"storage": NARROW}),
    (2, torch.bfloat16, ADAMW, {"storage": NARROW, "sharding": Sharding(gradients=True, weights=True)}),
    (2, torch.float32, ADAMW, {"sharding": Sharding(gradients=True), "reduction": Reduction()}),
]


@pytest.mark.parametrize(("dp", "dtype", "rule", "settings"), CASES)
def test_it_changes_no_bit(pool: Pools, dp: int, dtype: torch.dtype, rule: Rule, settings: dict[str, Any]) -> None:
    expected = pool(dp).run(train, dp, 0.0, dtype, rule, settings)
    for share in (0.5, 1.0):
        for found, same in zip(pool(dp).run(train, dp, share, dtype, rule, settings), expected, strict=True):
            assert found.keys() == same.keys()
            assert [name for name in same if not torch.equal(found[name], same[name])] == []


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.5, 1), (0.9, 3), (1.0, 4)])
def test_the_largest_buckets_are_on_the_host(share: float, count: int) -> None:
    """And nothing of them that an update touches is the device's."""
    _, optimizer = make(1, share, torch.float32)
    buckets = sorted(optimizer._buckets, key=lambda bucket: -bucket.layout.size)
    assert [bucket.host is not None for bucket in buckets] == [place < count for place in range(len(buckets))]
    for bucket, states in zip(optimizer._buckets, optimizer._states, strict=True):
        touched = [bucket.master, bucket.update_grad, *states.values()]
        whole = {bucket.weights.untyped_storage().data_ptr(), bucket.grads.untyped_storage().data_ptr()}
        assert (bucket.host is None) is any(x.untyped_storage().data_ptr() in whole for x in touched)


@pytest.mark.parametrize("name", ["begin_fetch", "await_fetch", "begin_publish"])
def test_every_part_of_the_way_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Mutants: gradients that never leave, are not awaited, and weights that never come back."""
    expected = train(1, 0.0, torch.float32, ADAMW, {})
    right = Bucket.begin_publish

    def wrong(bucket: Bucket) -> None:
        if name == "begin_publish":
            host, bucket.host = bucket.host, None
            right(bucket)
            bucket.host = host

    def late(host: Host, x: Tensor, out: Tensor) -> Any:
        """A copy that is made when it is awaited."""
        return type("Late", (), {"wait": lambda self: out.copy_(x)})()

    if name == "await_fetch":
        monkeypatch.setattr(Host, "fetch", late)
        assert all(torch.equal(value, expected[key]) for key, value in train(1, 1.0, torch.float32, ADAMW, {}).items())
    monkeypatch.setattr(Bucket, name, wrong)
    if name == "begin_fetch":
        monkeypatch.setattr(Bucket, "await_fetch", wrong)
    found = train(1, 1.0, torch.float32, ADAMW, {})
    assert not any(torch.equal(found[key], expected[key]) for key in ("matrix", "norm", "wide"))


def test_weights_that_are_not_their_masters_are_named() -> None:
    infos, optimizer = make(1, 1.0, torch.bfloat16)
    step(infos, optimizer, 0)
    assert optimizer.not_masters() == []
    with torch.no_grad():
        infos[2].param[0, 0] += 1
    assert optimizer.not_masters() == [infos[2].name]
    optimizer.refresh_masters()
    assert optimizer.not_masters() == []
