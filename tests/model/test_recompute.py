"""Recomputation changes no bit, keeps what the memory plan says, and says in backward what it said forward."""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.kernels.attention import causal_attention
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.ops import Kernels
from megatron_aquila.model.aquila import AquilaStage
from megatron_aquila.model.init import initialize_
from megatron_aquila.model.recompute import _Run, feed
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.memory import MemoryPlan
from megatron_aquila.plan.recompute import KEEP_ALL, MODULES, Kind, RecomputePlan, plan_recompute
from megatron_aquila.plan.shape import ModelShape, Precision
from megatron_aquila.plan.stages import StagePlan, plan_stages
from megatron_aquila.train.build import DTYPES
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import agree, compute_gradients
from megatron_aquila.verify.observe import build_small, machine_batches
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.sample import sample_batch
from tests.model.test_aquila import SHAPE

CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_size=48,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=61,
        vocab_multiple=8,
        seq_len=16,
        init_std=0.2,
    ),
    parallel=ParallelConfig(data=1, bucket_mib=1),
    data=DataConfig(reset_attention_mask=True, reset_position_ids=True, eod_token_id=7),
    train=TrainConfig(precision="bf16", global_batch=4, train_samples=4),
)
KINDS: Mapping[str, dict[str, Any]] = {
    "norms and swiglu": {"recompute": "selective"},
    "attention": {"recompute": "selective", "recompute_modules": ("attention",)},
    "all modules": {"recompute": "selective", "recompute_modules": MODULES},
    "each layer": {"recompute": "full"},
    "groups of two": {"recompute": "full", "recompute_layers": 2},
    "the first of each stage": {"recompute": "full", "recompute_method": "block"},
    "some microbatches": {"recompute": "full", "recompute_granularity_per_stage": ("1, 1, 0, 3, 1", "1, 2, 1, 2, 0")},
}


def gradients(config: RunConfig) -> dict[str, Tensor]:
    """This rank's shard of the reduced gradients of a step, and its loss. Collective; runs in a worker."""
    machine = build_small(config)
    batches = machine_batches(machine)
    tokens = agree(machine.ctx, batches).num_tokens
    sums = LossSums(("even", "odd"), num_tokens=tokens, device=machine.ctx.device, loss_scale=1.0)
    compute_gradients(machine, batches, sums)
    found = {
        f"{number}": values.clone()
        for number, (kind, _, values) in enumerate(machine.optimizer.ranges())
        if kind == "grad"
    }
    return found | {"loss": torch.tensor(sums.means(machine.ctx).loss, dtype=torch.float64)}


def unequal(config: RunConfig, kinds: Mapping[str, dict[str, Any]]) -> list[str]:
    """The kinds of recomputation whose gradients differ in a bit from those of none. Runs in a worker."""
    expected = gradients(config)
    assert any(value.any() for value in expected.values())
    wrong = []
    for name, settings in kinds.items():
        found = gradients(replace(config, train=replace(config.train, **settings)))
        if not all(torch.equal(found[key], value) for key, value in expected.items()):
            wrong.append(name)
    return wrong


def for_stages(num_stages: int) -> dict[str, dict[str, Any]]:
    """The kinds that exist for so many stages."""
    return {name: kind for name, kind in KINDS.items() if name != "some microbatches" or num_stages == 2}


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_no_bit_changes_on_one_rank(precision: Any) -> None:
    with one_rank():
        config = replace(CONFIG, train=replace(CONFIG.train, precision=precision))
        assert unequal(config, for_stages(1)) == []


@contextmanager
def one_rank() -> Iterator[None]:
    """``build_small`` in this process."""
    with mock.patch("megatron_aquila.verify.observe.create_context", return_value=ParallelContext.single()):
        yield


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"pipeline": 2, "schedule": "zb-h1", "tensor": 2, "sequence": True},
        {"pipeline": 2, "schedule": "gpipe", "data": 2},
    ],
    ids=str,
)
def test_no_bit_changes_in_a_world(layout: dict[str, Any], pool: Callable[[int], WorkerPool]) -> None:
    parallel = replace(CONFIG.parallel, **layout)
    world = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    train = replace(CONFIG.train, global_batch=4 * (parallel.data or 1))
    config = replace(CONFIG, parallel=parallel, train=train)
    assert pool(world).run(unequal, config, for_stages(parallel.pipeline)) == [[]] * world


def rounds(run: Callable[[Any], Any], again: Any) -> Any:
    """The second run in another precision: its outputs are rounded."""
    if not again._again:
        run(again)
        with torch.enable_grad():
            again._again = tuple(x.to(torch.bfloat16).to(x.dtype) for x in again._again)
    return again._again


def shifts(run: Callable[[Any], Any], again: Any) -> Any:
    """The second run on another input: every token's neighbour."""
    if not again._again:
        again._kept = tuple(x.roll(1, 0) for x in again._kept)
    return run(again)


@pytest.mark.parametrize("mutant", [rounds, shifts])
def test_a_wrong_second_run_is_seen(mutant: Callable[[Any, Any], Any]) -> None:
    """Bit-equality is no empty promise: a second run that is not the first is found, whatever is recomputed."""
    run = _Run.outputs
    config = replace(CONFIG, train=replace(CONFIG.train, precision="fp32"))
    with one_rank(), mock.patch.object(_Run, "outputs", lambda again: mutant(run, again)):
        assert unequal(config, for_stages(1)) == list(for_stages(1))


def test_a_second_run_without_documents_is_seen() -> None:
    calls = itertools.count()

    def forgetful(q: Tensor, k: Tensor, v: Tensor, documents: Any = None) -> Tensor:
        is_again = torch.is_grad_enabled() and next(calls) >= 0  # the first run has no graph
        return causal_attention(q, k, v, None if is_again else documents)

    kernels = replace(choose_kernels(torch.device("cpu"), torch.bfloat16), attention=forgetful)
    config = replace(CONFIG, train=replace(CONFIG.train, recompute="full"))
    with one_rank():
        expected = gradients(config)
        with mock.patch("megatron_aquila.train.build.choose_kernels", return_value=kernels):
            found = gradients(config)
    assert next(calls) == CONFIG.model.num_layers * 4
    assert not all(torch.equal(found[key], value) for key, value in expected.items() if key != "loss")
    assert torch.equal(found["loss"], expected["loss"])


def test_the_consumer_is_not_run_again_and_the_function_once() -> None:
    ran = {"function": 0, "consumer": 0}
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        ran["function"] += 1
        return torch.tanh(x @ weight)

    def consumer(y: Tensor) -> Tensor:
        ran["consumer"] += 1
        return (y * y).sum()

    def ran_by(recompute: bool, *, is_training: bool = True) -> dict[str, int]:
        ran.update(function=0, consumer=0)
        x.grad = weight.grad = None
        with torch.set_grad_enabled(is_training):
            out = feed(function, consumer, x, recompute=recompute)
        if is_training:
            out.backward()  # type: ignore[no-untyped-call]
        return dict(ran)

    assert ran_by(False) == {"function": 1, "consumer": 1}
    assert x.grad is not None
    assert weight.grad is not None
    expected = x.grad.clone(), weight.grad.clone()
    assert ran_by(True) == {"function": 2, "consumer": 1}
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])
    assert ran_by(True, is_training=False) == {"function": 1, "consumer": 1}


class Living(TorchDispatchMode):
    """Bytes of the storages made inside that are still there. Function objects keep some that no saved tensor shows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self._known = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **({} if kwargs is None else kwargs))
        there = {leaf.untyped_storage()._cdata for leaf in tree_iter(args) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in there:
                self._meet(leaf.untyped_storage())
        return out

    def _meet(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.num_bytes += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.num_bytes -= num_bytes


Collect = Callable[[], object]
WIDE = replace(SHAPE, hidden_size=64, head_dim=16, ffn_size=160, seq_len=32)


def kept(
    shape: ModelShape,
    plan: StagePlan,
    recompute: RecomputePlan,
    kernels: Kernels,
    precision: Precision,
    collect: Collect,
) -> tuple[int, int]:
    """Bytes that live after the forward of the middle one of three stages, and after its backward."""
    dtype = DTYPES[precision]
    placement = Placement(
        tp=ParallelContext.single().tp, sequence_parallel=False, dtype=dtype, device=torch.device("cpu")
    )
    stage = AquilaStage(shape, plan, 1, placement=placement, kernels=kernels, recompute=recompute)
    initialize_(stage.param_infos(), seed=3)
    for weight in stage.parameters():
        weight.grad = torch.zeros_like(weight)
    batch = sample_batch(shape, range(2), seed=5)
    x = torch.randn(shape.seq_len, 2, shape.hidden_size, dtype=dtype, requires_grad=True)
    with Living() as living:
        x_in = x * 1  # so that the stage's input is counted
        edge = torch.autograd.graph.get_gradient_edge(stage(x_in, batch))
        grad = torch.ones_like(x)
        after_forward = living.num_bytes - grad.nbytes
        del x_in
        torch.autograd.backward(edge, grad)
        del edge, grad
        x.grad = None
        collect()
        return after_forward, living.num_bytes


def kept_of_two_layers(
    shape: ModelShape, kernels: Kernels, precision: Precision, *, collect: Collect = lambda: None, **settings: Any
) -> tuple[int, int]:
    """Bytes by which a stage of four layers keeps more than one of two: measured, and as planned for ``settings``.

    Nothing may be left after backward and ``collect``.
    """
    measured, planned = [], []
    for num_layers in (2, 4):
        whole = replace(shape, num_layers=num_layers + 2)
        plan = plan_stages(whole, 3, (1, num_layers, 1))
        recompute = plan_recompute(plan, **settings)
        after_forward, after_backward = kept(whole, plan, recompute, kernels, precision, collect)
        assert after_backward == 0
        measured.append(after_forward)
        memory = MemoryPlan(
            shape=whole,
            grid=RankGrid(pp=3),
            stages=plan,
            micro_batch=2,
            order=build_schedule("1f1b", 3, 1, 1),
            precision=precision,
            recompute=recompute,
        )
        planned.append(memory.activations_of_rank(1))
    return measured[1] - measured[0], planned[1] - planned[0]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("none", {}),
        *[("selective", {"modules": [module]}) for module in MODULES],
        ("selective", {"modules": MODULES}),
        ("full", {}),
        ("full", {"num_layers": 2}),
        ("full", {"method": "block", "num_layers": 2}),
    ],
    ids=str,
)
def test_what_is_kept_is_what_the_plan_says(kind: Kind, settings: dict[str, Any], precision: Precision) -> None:
    """Byte for byte."""
    kernels = choose_kernels(torch.device("cpu"), DTYPES[precision])
    measured, planned = kept_of_two_layers(WIDE, kernels, precision, kind=kind, **settings)
    assert measured == planned


def test_without_gradients_nothing_is_recomputed() -> None:
    stages = plan_stages(SHAPE, 1)
    placement = Placement(
        tp=ParallelContext.single().tp, sequence_parallel=False, dtype=torch.float32, device=torch.device("cpu")
    )
    kernels = choose_kernels(torch.device("cpu"), torch.float32)

    def stage(recompute: RecomputePlan) -> AquilaStage:
        built = AquilaStage(SHAPE, stages, 0, placement=placement, kernels=kernels, recompute=recompute)
        initialize_(built.param_infos(), seed=3)
        return built

    batch = sample_batch(SHAPE, range(2), seed=5)
    with torch.no_grad(), mock.patch("megatron_aquila.model.recompute._Run", side_effect=AssertionError):
        for kind in ("selective", "full"):
            recomputing = stage(plan_recompute(stages, kind=kind, modules=MODULES))
            assert torch.equal(recomputing(None, batch), stage(KEEP_ALL)(None, batch))
            recomputing.logits(None, batch.tokens_BS, batch.positions_BS)
