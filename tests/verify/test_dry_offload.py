"""Optimizer states on the host in a dry run: bytes on both sides, and between them, are what the plan says."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aquila.config.derive import derive, memory_plan, traffic_plan
from megatron_aquila.config.describe import derived_rows, traffic_rows
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.stages import Bubble
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.verify.dry import StorageTracker, dry_machine, fake_world
from tests.verify.test_dry import COUNT, recipe

WORLD = 512


class Copies(TorchDispatchMode):
    """Bytes that were copied between the host's storages and the device's."""

    def __init__(self, host: list[Tensor], device: list[Tensor]) -> None:
        super().__init__()
        self._host, self._device = ({x.untyped_storage()._cdata for x in some} for some in (host, device))
        self.to_host = self.from_host = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.overloadpacket.__name__ == "copy_":
            out, x = (one.untyped_storage()._cdata for one in args[:2])
            self.to_host += args[0].nbytes * (out in self._host and x in self._device)
            self.from_host += args[0].nbytes * (x in self._host and out in self._device)
        return func(*args, **({} if kwargs is None else kwargs))


def offloaded(share: float, **optim: Any) -> RunConfig:
    config = recipe("aquila2-34b")
    return replace(config, optim=replace(config.optim, offload_optimizer=share, **optim))


def bytes_of(tensors: list[Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize(
    ("share", "optim"),
    [(0.3, {}), (1.0, {}), (0.5, {"moments_dtype": "bf16", "master_weights": "remainder"})],
)
def test_bytes_on_both_sides_and_between_them_are_what_the_plan_says(share: float, optim: dict[str, Any]) -> None:
    config = offloaded(share, **optim)
    derived = derive(config, WORLD)
    with fake_world(0, WORLD), StorageTracker() as storages:
        optimizer = dry_machine(config, WORLD).optimizer
        static = storages.live
        there = [
            tensor
            for bucket, states in zip(optimizer._buckets, optimizer._states, strict=True)
            if bucket.host is not None
            for tensor in (bucket.update_grad, bucket.new_weights, bucket.master, bucket.remainder, *states.values())
            if tensor is not None
        ]
        with Copies(there, [x for bucket in optimizer._buckets for x in (bucket.weights, bucket.grads)]) as copies:
            optimizer.begin_step(1)
            optimizer.reduce_gradients()
            optimizer.step(0.1, optimizer.clip(1.0))
    plan = replace(memory_plan(config, derived, run_schedule(config, derived)), pinned=False)
    here, host = plan.of_rank(0), plan.host_of_rank(0)
    assert bytes_of(there) == host.total
    kept = here.weights + here.main_grads + here.master_weights + here.optimizer_states
    assert static == kept + host.total + COUNT
    moved = {row.kind: row.num_bytes for row in traffic_plan(config, derived).of_rank(0) if row.group == "host"}
    assert moved == {"to host": copies.to_host, "from host": copies.from_host}


def test_what_travels_is_pinned_in_powers_of_two() -> None:
    config = offloaded(0.3)
    derived = derive(config, WORLD)
    order = run_schedule(config, derived)
    pinned = memory_plan(config, derived, order)
    sizes = pinned._offloaded(0)
    expected = replace(
        replace(pinned, pinned=False).host_of_rank(0),
        gradients=sum(1 << (4 * size - 1).bit_length() for size in sizes),
        weights=sum(1 << (2 * size - 1).bit_length() for size in sizes),
    )
    assert pinned.host_of_rank(0) == expected
    on_cpus = replace(config, train=replace(config.train, device="cpu"))
    assert memory_plan(on_cpus, derived, order) == replace(pinned, pinned=False)
    assert pinned.host_of_rank(0).total > memory_plan(on_cpus, derived, order).host_of_rank(0).total, (
        "the test can fail"
    )


def test_the_plan_tells_of_the_host() -> None:
    config = offloaded(1.0)
    derived = derive(config, WORLD)
    order = run_schedule(config, derived)
    rows = dict(derived_rows(config, derived, order, bubble=Bubble(own=0.0, equal=0.0)))
    assert "master weights" not in rows["memory, pp rank 0"]
    assert "optimizer states" not in rows["memory, pp rank 0"]
    assert "optimizer states" in rows["host memory, pp rank 0"]
    kinds = [row[1] for row in traffic_rows(config, derived, order)[1] if row[2] == "host 1"]
    assert kinds == ["to host", "from host"]
    plain = offloaded(0.0)
    assert not any("host" in name for name, _ in derived_rows(plain, derived, order, bubble=Bubble(own=0.0, equal=0.0)))
    assert memory_plan(plain, derived, order).host_of_rank(0).total == 0
