"""A recorded step is the step: bit for bit, for batches, weights of the loss and numbers of microbatches that change.

What records here is the CPU's stand-in of ``tests.train.tape``; a GPU's own has no test without one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.errors import AquilaError
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.train import build, graphs
from megatron_aquila.train.build import step_runner
from megatron_aquila.train.graphs import Capture, CudaCapture, StepGraph, at_once, refill_
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import agree, compute_gradients
from megatron_aquila.verify.observe import SOURCES, build_small, machine_batches
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import run, tiny_config
from tests.train.tape import CpuCapture
from tests.train.test_step import rows, saved

Pools = Callable[[int], WorkerPool]


def small(*, model: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Two layers in float32, two microbatches of two samples on each of one replica."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48, "seq_len": 16}
    sizes |= {"vocab_size": 61, "vocab_multiple": 8, "init_std": 0.2}
    settings = {"precision": "fp32", "device": "cpu", "micro_batch": 2, "global_batch": 4, "train_samples": 40}
    return RunConfig(
        model=ModelConfig(**sizes | (model or {})),
        parallel=ParallelConfig(**{"data": 1, "bucket_mib": 1} | (parallel or {})),
        train=TrainConfig(**settings | train),  # type: ignore[arg-type]
    )


def steps(
    config: RunConfig,
    *,
    warm_up: int | None,
    sizes: Sequence[int] = (2, 2, 2),
    capture: Callable[[torch.device], Capture] = lambda _device: CpuCapture(),
) -> list[list[Tensor]]:
    """Steps of so many microbatches with other samples and another loss scale each: what each leaves, as tensors.

    Recorded after ``warm_up`` of them; with None never. Runs in a worker.
    """
    machine = build_small(config)
    device = machine.ctx.device
    if warm_up is not None:
        settle, world = machine.optimizer.settle, machine.ctx.host_world
        runner = StepGraph(capture(device), settle=settle, world=world, warm_up=warm_up)
        machine = replace(machine, runner=runner)
    left = []
    for step, size in enumerate(sizes):
        batches = machine_batches(replace(machine, config=replace(config, seed=step)))[:size]
        tokens, has_z_loss = agree(machine.ctx, batches).num_tokens, config.model.max_z_loss > 0
        sums = LossSums(SOURCES, num_tokens=tokens, device=device, loss_scale=2.0**step, has_z_loss=has_z_loss)
        compute_gradients(machine, [batch.to(device) for batch in batches], sums)
        clip = machine.optimizer.clip(1.0, loss_scale=2.0**step)
        machine.optimizer.step(1e-2, clip)
        kept = [values.clone() for _, _, values in machine.optimizer.ranges()]
        left.append([sums.total(machine.ctx), clip.norm, *kept])
    return left


def alike(config: RunConfig, **how: Any) -> list[bool]:
    """Of each step whether all that it leaves is the same when it is recorded. Runs in a worker."""
    right, recorded = steps(config, warm_up=None, **how), steps(config, warm_up=1, **how)
    return [all(map(torch.equal, one, other)) for one, other in zip(right, recorded, strict=True)]


KINDS: dict[str, dict[str, Any]] = {
    "a batch ramp": {"rampup_batch": (2, 2, 8)},
    "bf16, max-z loss, rows of length 1, selective": {
        "precision": "bf16",
        "recompute": "selective",
        "model": {"max_z_loss": 1e-3, "norm_head": True},
    },
    "fp8": {"precision": "fp8"},
    "fp16, all logits, full": {"precision": "fp16", "recompute": "full", "loss_chunk_tokens": 0},
    "two chunks a rank, gradients by autograd": {"parallel": {"chunks": 2, "fuse_main_grads": False}},
    "YaRN, clamped scores": {"model": {"rope_scaling": "yarn", "rope_factor": 4.0, "score_clamp": 5.0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_changes(kind: str) -> None:
    with one_rank():
        if kind == "a batch ramp":
            assert alike(small(**KINDS[kind]), sizes=(1, 1, 2, 2)) == [True] * 4
        else:
            assert alike(small(**KINDS[kind])) == [True] * 3


@contextmanager
def one_rank() -> Iterator[None]:
    """``build_small`` in this process."""
    with mock.patch("megatron_aquila.verify.observe.create_context", return_value=ParallelContext.single()):
        yield


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2, "sequence": True}, {"data": 2}, {"context": 2}, {"context": 2, "context_method": "ulysses"}],
    ids=str,
)
def test_no_bit_changes_over_ranks(pool: Pools, parallel: dict[str, Any]) -> None:
    config = small(parallel=parallel, global_batch=4 * parallel.get("data", 1))
    assert pool(2).run(alike, config) == [[True] * 3] * 2


def test_a_run_is_the_same_with_validations_checkpoints_and_a_ramp(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, precision="fp32", rampup_batch=(4, 4, 16), train_samples=40)
    right = run(config)
    config = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "recorded"))
    capture = CpuCapture()

    def runner(train: TrainConfig, ctx: ParallelContext, optimizer: DistributedOptimizer) -> StepGraph:
        return StepGraph(capture, settle=optimizer.settle, world=ctx.host_world, warm_up=2)

    with mock.patch.object(build, "step_runner", runner):
        recorded = run(config)
    assert len(capture.tapes) == 2, "one for each number of microbatches"
    assert rows(recorded) == rows(right)
    assert recorded.validations == right.validations
    for folder in (tmp_path / "run").glob("step_*"):
        (state, tensors), (expected, others) = saved(tmp_path / "recorded" / folder.name), saved(folder)
        assert state == expected
        assert all(torch.equal(tensors[name], others[name]) for name in others)


def nothing(*_operands: Any) -> None:
    """In place of a copy."""


def only_masks(own: Batch, batch: Batch) -> None:
    """In place of ``refill_``: without tokens, labels and positions."""
    own.loss_mask_BS.copy_(batch.loss_mask_BS)


MUTANTS = {
    "the batch is not copied": (graphs, "refill_", only_masks, 2),
    "the sums go on": (LossSums, "restart_", nothing, 2),
    "the loss is multiplied as it was": (LossSums, "weigh_as_", nothing, 2),
    "the sums stay where they are": (LossSums, "take_", nothing, 1),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_not_carried_over_is_seen(mutant: str) -> None:
    """Sums and weights as of the first step are right in the step that is recorded, and wrong in the next."""
    owner, name, wrong, first = MUTANTS[mutant]
    with one_rank():
        right = steps(small(global_batch=2), warm_up=None, sizes=(1, 1, 1))
        with mock.patch.object(owner, name, wrong):
            found = steps(small(global_batch=2), warm_up=1, sizes=(1, 1, 1))
    same = [all(map(torch.equal, one, other)) for one, other in zip(right, found, strict=True)]
    assert same[:first] == [True] * first
    assert not same[first]


def test_work_on_memory_that_goes_away_is_seen() -> None:
    held, total = [torch.ones(3)], torch.zeros(3)
    replay = CpuCapture().record(lambda: nothing(total.add_(held[0])))
    assert total.tolist() == [0, 0, 0], "recording does nothing"
    replay()
    assert total.tolist() == [1, 1, 1]
    held.clear()
    with pytest.raises(RuntimeError, match="that was recorded is gone"):
        replay()


ASKS: dict[str, Callable[[Tensor], Any]] = {
    "item": Tensor.item,
    "tolist": Tensor.tolist,
    "if": bool,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": Tensor.nonzero,
    "a mask": lambda x: x.expand(2)[x.expand(2) > 0],
    "a tensor of the host's": lambda x: x + torch.tensor(1.0),
}


@pytest.mark.parametrize("ask", ASKS)
def test_a_step_that_asks_the_host_is_refused(ask: str) -> None:
    """Also within backward, which runs in the same thread here."""
    right = LossSums.loss

    def loss(self: LossSums, loss_SB: Tensor, batch: Batch) -> Tensor:
        found = right(self, loss_SB, batch)
        found.register_hook(lambda grad: nothing(ASKS[ask](grad)))
        return found

    words = r"--cuda-graph: a step of 1 microbatches cannot be recorded: .* needs the host .*; leave it out"
    with one_rank(), mock.patch.object(LossSums, "loss", loss):
        assert len(steps(small(global_batch=2), warm_up=None, sizes=(1,))) == 1
        with pytest.raises(AquilaError, match=words):
            steps(small(global_batch=2), warm_up=0, sizes=(1,))


class Ending(CpuCapture):
    """As ``torch.cuda.graph``, whose end raises an error of its own over the one that spoiled the capture."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            work()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class Broken(CpuCapture):
    """Of a device that had failed before."""

    def settle(self) -> None:
        raise RuntimeError("an illegal memory access was encountered")


def record_once(capture: Capture, world: Group, error: Exception | None = None) -> None:
    """Raises what recording a step that raises ``error`` does. Runs in a worker."""

    def work(*_operands: Any) -> None:
        if error is not None:
            raise error

    sums = LossSums(["a"], num_tokens=1, device=torch.device("cpu"))
    StepGraph(capture, settle=nothing, world=world, warm_up=0)(work, [], sums)


def test_what_spoiled_a_recording_is_told() -> None:
    alone = ParallelContext.single().host_world
    for error in (torch.OutOfMemoryError("tried to allocate"), AquilaError("of ours"), AssertionError("a mistake")):
        with pytest.raises(type(error), match=rf"^{error}$"):
            record_once(Ending(), alone, error)
    with pytest.raises(AquilaError, match=r"cannot be recorded: not permitted; leave it out"):
        record_once(Ending(), alone, RuntimeError("not permitted\nSearch for it"))
    with pytest.raises(AquilaError, match=r"cannot be recorded: operation failed due to a previous error"):
        record_once(Ending(), alone)
    with pytest.raises(RuntimeError, match=r"^an illegal memory access was encountered$"):
        record_once(Broken(), alone)


def one_fails() -> str:
    """What each of two ranks is told where one cannot record. Runs in a worker."""
    world = build_small(small(parallel={"data": 2}, global_batch=8)).ctx.host_world
    error = RuntimeError("not permitted") if world.rank == 1 else None
    with pytest.raises(AquilaError) as raised:
        record_once(CpuCapture(), world, error)
    return str(raised.value)


def test_no_rank_replays_what_another_could_not_record(pool: Pools) -> None:
    told = "--cuda-graph: another rank could not record its step; it says why"
    failed = "--cuda-graph: a step of 0 microbatches cannot be recorded: not permitted; leave it out"
    assert pool(2).run(one_fails) == [told, failed]


def test_what_is_no_tensor_may_not_change() -> None:
    with one_rank():
        batch = machine_batches(build_small(small()))[0]
    with pytest.raises(AssertionError, match="microbatch was recorded as 0 and is 1"):
        refill_(batch, replace(batch, microbatch=1))
    with pytest.raises(AssertionError, match=r"tokens_BS was recorded as \(2, 16\) and is \(1, 16\)"):
        refill_(batch, replace(batch, tokens_BS=batch.tokens_BS[:1]))


def test_only_a_gpu_records() -> None:
    config = replace(TrainConfig(), cuda_graph=True)
    on_cpu, on_gpu = ParallelContext.single(), ParallelContext.single(torch.device("cuda"))
    assert step_runner(config, on_cpu, mock.Mock()) is at_once
    assert step_runner(TrainConfig(), on_gpu, mock.Mock()) is at_once
    with mock.patch.object(build, "CudaCapture", return_value=CpuCapture()):
        assert isinstance(step_runner(config, on_gpu, mock.Mock()), StepGraph)


def test_what_cuda_is_asked_for() -> None:
    """In which order, on which stream, and that other threads may go on: all that is left to a GPU."""
    calls: list[Any] = []

    @contextmanager
    def within(name: str, *_operands: Any, **settings: Any) -> Iterator[None]:
        calls.append((name, settings.get("capture_error_mode")))
        yield
        calls.append((f"end of {name}", None))

    cuda = mock.MagicMock()
    cuda.stream, cuda.graph = partial(within, "stream"), partial(within, "graph")
    cuda.current_stream.return_value.wait_stream = lambda _other: calls.append(("current waits", None))
    cuda.set_stream = lambda stream: calls.append(
        ("back", None) if stream is cuda.current_stream.return_value else stream
    )
    cuda.Stream.return_value.wait_stream = lambda _other: calls.append(("own waits", None))
    with mock.patch.object(torch, "cuda", cuda):
        capture = CudaCapture(torch.device("cuda", 0))
        capture.warm_up(lambda: calls.append(("work", None)))
        replay = capture.record(lambda: calls.append(("work", None)))
    assert replay is cuda.CUDAGraph.return_value.replay
    assert [name for name, _ in calls] == [
        *("own waits", "stream", "work", "end of stream", "current waits"),
        *("graph", "work", "end of graph", "back"),
    ]
    assert ("graph", "thread_local") in calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_the_same() -> None:
    device, config = torch.device("cuda"), small(precision="bf16", device="cuda")
    with mock.patch("megatron_aquila.verify.observe.create_context", return_value=ParallelContext.single(device)):
        right, found = (steps(config, warm_up=warm_up, capture=CudaCapture) for warm_up in (None, 2))
    for one, other in zip(right, found, strict=True):
        for tensor, again in zip(one, other, strict=True):
            torch.testing.assert_close(again, tensor, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_is_the_same_with_validations_checkpoints_and_a_ramp(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, device="cuda", precision="bf16", rampup_batch=(4, 4, 16), train_samples=40)
    right = run(config)
    config = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "recorded"))
    with mock.patch.object(CudaCapture, "record", autospec=True, side_effect=CudaCapture.record) as record:
        recorded = run(replace(config, train=replace(config.train, cuda_graph=True)))
    assert record.call_count == 2, "one for each number of microbatches"
    losses, right_losses = ([report.loss for report in found.reports] for found in (recorded, right))
    torch.testing.assert_close(losses, right_losses, rtol=2e-2, atol=0)
    torch.testing.assert_close(recorded.validations, right.validations, rtol=2e-2, atol=0)
    written, others = ({path.name for path in (tmp_path / name).glob("step_*")} for name in ("recorded", "run"))
    assert written == others != set()
