"""Activations on the host in a dry run: bytes on both sides, and between them, are what the plan says."""

from collections.abc import Mapping
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aquila.config.derive import derive, full_microbatches, memory_plan, traffic_plan
from megatron_aquila.config.describe import derived_rows, traffic_rows
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.model.offload import HostActivations
from megatron_aquila.plan.stages import Bubble
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.build import Machine
from megatron_aquila.verify.dry import StorageTracker, dry_batch, dry_machine, dry_step, fake_world

SMALL = 4096  # bytes: losses, norms, and the states of the flash kernel
MODEL = ModelConfig(num_layers=4, hidden_size=512, num_heads=8, num_kv_heads=4, seq_len=256, vocab_size=2048)


class Copies(TorchDispatchMode):
    """Bytes that were copied into the host's buffers and out of them."""

    def __init__(self, host: HostActivations) -> None:
        super().__init__()
        self._buffers, self._take = set[int](), host.take
        self.to_host = self.from_host = 0
        host.take = self._taken  # type: ignore[method-assign]

    def _taken(self, num_bytes: int) -> Any:
        buffer = self._take(num_bytes)
        self._buffers.add(buffer.memory.untyped_storage()._cdata)
        return buffer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.overloadpacket.__name__ == "copy_":
            out, x = (one.untyped_storage()._cdata in self._buffers for one in args[:2])
            self.to_host += args[0].nbytes * out
            self.from_host += args[0].nbytes * x
        return func(*args, **({} if kwargs is None else kwargs))


def host_of(machine: Machine) -> HostActivations:
    (host,) = {stage.host for stage in machine.stages.values()}
    assert host is not None, "nothing is offloaded"
    return host


def run_config(wanted: int, *, microbatches: int = 2, **settings: Any) -> RunConfig:
    parallel = {name: settings.pop(name) for name in list(settings) if hasattr(ParallelConfig, name)}
    return RunConfig(
        model=MODEL,
        parallel=ParallelConfig(bucket_mib=4, **parallel),
        train=TrainConfig(device="cpu", global_batch=microbatches, offload_activations=wanted, **settings),
    )


CASES = {  # settings, pipeline rank, and how far above the peak the plan may be
    "one stage": ({}, 0, 1.06),
    "all layers": ({"wanted": 4, "recompute": "selective"}, 0, 1.12),
    "gpipe": ({"pipeline": 2, "schedule": "gpipe"}, 1, 1.12),
    "1f1b": ({"pipeline": 2, "microbatches": 3}, 0, 1.08),
    "sp": ({"pipeline": 2, "tensor": 2, "sequence": True}, 1, 1.12),
    "full": ({"pipeline": 2, "recompute": "full"}, 1, 1.12),
    "groups": ({"recompute": "full", "recompute_layers": 2}, 0, 1.12),
    "some recomputed": ({"recompute": "full", "recompute_method": "block", "recompute_layers": 2}, 0, 1.4),
    "ulysses": ({"context": 2, "context_method": "ulysses"}, 0, 1.12),
    "interleaved": ({"pipeline": 2, "chunks": 2, "wanted": 1, "microbatches": 4}, 0, 1.3),
    "zb-h1": ({"pipeline": 2, "schedule": "zb-h1", "wanted": 1, "microbatches": 3}, 1, 1.3),
    "zb-v": ({"pipeline": 2, "schedule": "zb-v", "wanted": 1, "microbatches": 4}, 1, 1.4),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_on_both_sides_and_between_them_are_what_the_plan_says(case: str) -> None:
    settings, pp_rank, above = CASES[case]
    config = run_config(**{"wanted": 2, **settings})
    parallel = config.parallel
    world = parallel.tensor * parallel.pipeline * parallel.context
    derived = derive(config, world)
    plan = memory_plan(config, derived, run_schedule(config, derived))
    with fake_world(derived.grid.rank(pp=pp_rank), world), StorageTracker() as storages:
        machine = dry_machine(config, world)
        host, static = host_of(machine), storages.live
        with Copies(host) as copies:
            batches = [dry_batch(derived.shape, 1, cp=parallel.context) for _ in range(full_microbatches(derived))]
            tokens = storages.live - static
            dry_step(machine, batches)
        peak = storages.peak - static - tokens - host.num_bytes
    memory, there = plan.of_rank(pp_rank), plan.host_of_rank(pp_rank).activations
    assert host.num_bytes == there
    moved = {row.kind: row.num_bytes for row in traffic_plan(config, derived).of_rank(pp_rank) if row.group == "host"}
    assert moved == {"to host": copies.to_host, "from host": copies.from_host}
    planned = memory.activations + memory.logits + memory.temporaries
    assert peak - SMALL <= planned <= above * peak


def test_the_plan_tells_of_the_host() -> None:
    config = run_config(2)
    derived = derive(config, 1)
    rows = dict(derived_rows(config, derived, run_schedule(config, derived), bubble=Bubble(own=0.0, equal=0.0)))
    assert "activations" in rows["host memory, pp rank 0"]
    found = traffic_rows(config, derived, run_schedule(config, derived))[1]
    assert [row[:3] for row in found if row[2] == "host 1"] == [
        ("activations", "to host", "host 1"),
        ("activations", "from host", "host 1"),
    ]
    plain, order = run_config(0), run_schedule(config, derived)
    assert not any("host" in name for name, _ in derived_rows(plain, derived, order, bubble=Bubble(own=0.0, equal=0.0)))
    assert memory_plan(plain, derived, order).host_of_rank(0).total == 0
