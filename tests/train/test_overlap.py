"""The whole machine with collectives beside computation: the same bits, and no weight is read too early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.config.schema import ModelConfig, RunConfig
from megatron_aquila.errors import ReplicaError
from megatron_aquila.optim import buckets
from megatron_aquila.optim.buckets import Bucket
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.pipeline.engine import Engine
from megatron_aquila.train import build, trainer
from megatron_aquila.train.build import Machine
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import agree, compute_gradients
from megatron_aquila.verify.layout import Layout, with_layout
from megatron_aquila.verify.observe import (
    SOURCES,
    assemble,
    build_small,
    current_weights,
    gradient_chunks,
    machine_batches,
)
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.shrink import shrink
from tests.optim.test_reduction import gathered_late
from tests.parallel.worlds import CountCollectives, distance
from tests.train import runs

Pools = Callable[[int], WorkerPool]
FULL = Layout(tp=2, sequence=True, pp=2, dp=2)
SMALL = shrink(RunConfig(model=ModelConfig(num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=4)), FULL)
TINY_BUCKETS = 1 / 256  # MiB: about one to three weights of the small model


def config_of(layout: Layout, precision: str = "fp64", **parallel: Any) -> RunConfig:
    config = with_layout(SMALL, replace(layout, overlap=True, fused=True))
    changed = {"bucket_mib": TINY_BUCKETS} | parallel
    return replace(
        config,
        parallel=replace(config.parallel, **changed),
        train=replace(config.train, precision=precision),
    )


def compute(machine: Machine) -> None:
    ctx, batches = machine.ctx, machine_batches(machine)
    sums = LossSums(SOURCES, num_tokens=agree(ctx, batches).num_tokens, device=ctx.device)
    compute_gradients(machine, batches, sums)


def two_steps(config: RunConfig) -> tuple[list[Chunk], list[Chunk]]:
    """Gradients of the second step and the weights after it."""
    machine = build_small(config)
    for _ in range(2):
        compute(machine)
        gradients = [replace(chunk, tensor=chunk.tensor.clone()) for chunk in gradient_chunks(machine)]
        machine.optimizer.step(0.01, machine.optimizer.clip(0.0))
    return gradients, current_weights(machine)


def whole(results: list[tuple[list[Chunk], list[Chunk]]]) -> dict[str, Tensor]:
    tensors = assemble(chunk for gradients, _ in results for chunk in gradients)
    after = assemble(chunk for _, weights in results for chunk in weights)
    return {f"gradient of {name}": value for name, value in tensors.items()} | after


LAYOUTS = [Layout(tp=2, sequence=True, dp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2)]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_overlap_changes_no_bit(pool: Pools, layout: Layout, fuse: bool) -> None:
    schedule = "zb-h1" if layout.pp > 1 else "1f1b"
    runs = [
        whole(
            pool(4).run(two_steps, config_of(layout, "bf16", overlap=overlap, fuse_main_grads=fuse, schedule=schedule))
        )
        for overlap in (False, True)
    ]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def first_gradients(config: RunConfig) -> list[Chunk]:
    machine = build_small(config)
    compute(machine)
    return [replace(chunk, tensor=chunk.tensor.clone()) for chunk in gradient_chunks(machine)]


# float64, float32: a sum of 4 microbatches of 16 rows in another order. bfloat16: autograd's way rounds each of the 4
# microbatches' products to 8 significant bits, half an ulp each, of the sizes that add up.
FUSION = {"fp64": 64 * 2**-53, "fp32": 64 * 2**-24, "bf16": 4 * 2**-8}


@pytest.mark.parametrize("precision", FUSION)
def test_fused_sums_are_near_those_of_autograd(pool: Pools, precision: str) -> None:
    found = [
        assemble(
            chunk
            for part in pool(1).run(first_gradients, config_of(Layout(), precision, fuse_main_grads=fuse))
            for chunk in part
        )
        for fuse in (False, True)
    ]
    apart = {name: distance(found[1][name], value) for name, value in found[0].items()}
    assert max(apart.values()) <= FUSION[precision], apart
    if precision == "bf16":
        assert max(apart.values()) > 2**-14, "the sums should not be the same: one of them rounds"


@contextmanager
def told(events: list[str]) -> Iterator[None]:
    """``events`` tells when buckets and the engine's step begin and end, and which module a wait was for."""

    def tell(owner: type, name: str, before: str | None, after: str | None) -> Any:
        real = getattr(owner, name)

        def method(self: Any, *args: Any) -> Any:
            if before is not None and not (name == "finish_publish" and self._gathering is None):
                events.append(before)
            result = real(self, *args)
            if after is not None:
                events.append(after)
            return result

        return patch.object(owner, name, method)

    with (
        tell(Engine, "step", "engine", "engine done"),
        tell(Bucket, "begin_reduce", "reduce", None),
        tell(Bucket, "finish_reduce", "reduced", None),
        tell(Bucket, "begin_publish", "gather", None),
        tell(Bucket, "finish_publish", "gathered", None),
    ):
        yield


def events_of(config: RunConfig) -> tuple[list[str], int, dict[str, int]]:
    """What happened from a step's backward to the next one's, the number of buckets, and the collectives of a step."""
    machine = build_small(config)
    compute(machine)
    machine.optimizer.step(0.01, machine.optimizer.clip(0.0))
    machine.optimizer.settle()
    events: list[str] = []
    with told(events), CountCollectives() as counted:
        compute(machine)
        machine.optimizer.step(0.01, machine.optimizer.clip(0.0))
    counts = dict(counted.counts)
    with told(events):
        compute(machine)
    return events, len(machine.optimizer._buckets), counts


def test_reductions_begin_before_backward_ends_and_gathers_end_module_by_module(pool: Pools) -> None:
    layout = Layout(tp=2, sequence=True, dp=2)
    apart, together = (pool(4).run(events_of, config_of(layout, overlap=overlap)) for overlap in (False, True))
    for (events, num_buckets, counts), (_, before, expected) in zip(together, apart, strict=True):
        assert num_buckets == before
        assert num_buckets > 6
        assert counts == expected, "overlap costs no collective"
        backward = events[events.index("engine") : events.index("engine done")]
        assert backward.count("reduce") >= num_buckets - 3, "all but the norms', which are summed over tp first"
        assert "reduced" not in backward
        following = events[events.index("engine done") :]
        step = following[: following.index("engine")]
        assert step.count("gather") == num_buckets
        assert "gathered" not in step, "the step ends with the gathers under way"
        forward = following[following.index("engine") :]
        assert forward[1 : 1 + num_buckets] == ["gathered"] * num_buckets
    for events, num_buckets, _ in apart:
        backward = events[events.index("engine") : events.index("engine done")]
        assert "reduce" not in backward
        assert events[events.index("engine done") :][1 : 1 + num_buckets] == ["reduce"] * num_buckets


@contextmanager
def check_at_once() -> Iterator[None]:
    """Replicas are compared without a wait, neither of the masters' comparison nor of the weights'."""
    compare = trainer.check_replicated
    unread = patch.object(trainer, "check_replicated", lambda *args, read, **settings: compare(*args, **settings))
    with unread, patch.object(DistributedOptimizer, "not_masters", lambda self: []):
        yield


def late_run(config: RunConfig, forgotten: str | None) -> runs.Recorder:
    """A whole run whose gathers bring nothing before they are waited for; ``forgotten``: a wait that is left out."""

    def never(*_args: Any) -> None:
        pass

    left_out: dict[str | None, Any] = {
        "forward": lambda: patch.object(build, "wait_before_forward", never),
        "check": check_at_once,
        None: nullcontext,
    }
    with patch.object(buckets, "begin_all_gather_flat_", gathered_late), left_out[forgotten]():
        return runs.run(config)


def overlapping(config: RunConfig, *, overlap: bool) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, bucket_mib=TINY_BUCKETS, overlap=overlap))


def numbers(recorder: runs.Recorder) -> list[tuple[float, ...]]:
    return [(r.loss, r.grad_norm) for r in recorder.reports] + list(recorder.validations)


def test_every_reader_of_weights_waits_for_them(pool: Pools, tmp_path: Path) -> None:
    """Steps, validations, saves, replica checks and a resume, with gathers as late as the waits allow."""
    config = runs.tiny_config(tmp_path, check_replicas=1, train_samples=32)
    expected = pool(2).run(runs.run, overlapping(config, overlap=False))[0]
    config = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "late"))
    found = pool(2).run(late_run, overlapping(config, overlap=True), None)[0]
    assert numbers(found) == numbers(expected)
    assert found.validations
    for file in sorted((tmp_path / "run" / "step_0000004").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "late" / "step_0000004" / file.name).read_bytes()


@pytest.mark.parametrize("forgotten", ["forward", "check"])
def test_a_forgotten_wait_would_show(pool: Pools, tmp_path: Path, forgotten: str) -> None:
    config = runs.tiny_config(tmp_path, check_replicas=int(forgotten == "check"), train_samples=24, eval_interval=0)
    config = replace(config, checkpoint=replace(config.checkpoint, save=None))
    expected = pool(2).run(runs.run, overlapping(config, overlap=False))[0]
    if forgotten == "check":
        with pytest.raises(Exception, match=ReplicaError.__name__):
            pool(2).run(late_run, overlapping(config, overlap=True), forgotten)
    else:
        found = pool(2).run(late_run, overlapping(config, overlap=True), forgotten)[0]
        assert numbers(found) != numbers(expected)
