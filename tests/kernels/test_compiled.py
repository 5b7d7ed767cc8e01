"""Compiled references, traced for real and run by torch's eager backend: a C++ compiler takes minutes for the first."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_aquila.kernels.compiled import compiled
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, Kernels, choose_kernels
from megatron_aquila.kernels.self_check import Sizes, why_refused
from megatron_aquila.kernels.swiglu import swiglu_reference
from megatron_aquila.model.aquila import AquilaStage
from megatron_aquila.model.init import initialize_
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.recompute import KEEP_ALL, MODULES, RecomputePlan, plan_recompute
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages
from megatron_aquila.verify.sample import sample_batch

CPU = torch.device("cpu")
OPS = [op for op, names in IMPLEMENTATIONS.items() if "compiled" in names]
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    ffn_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    padded_vocab_size=32,
    seq_len=8,
)


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def fresh(op: str) -> Callable:
    """The op's compiled kernel, compiled by this test's backend."""
    return compiled(IMPLEMENTATIONS[op]["compiled"].__wrapped__)


@pytest.mark.parametrize("op", OPS)
def test_they_pass_the_trial_at_start(op: str) -> None:
    assert why_refused(op, fresh(op), device=CPU, dtype=torch.float32, sizes=Sizes()) is None


def test_they_can_be_asked_for_and_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(
        "megatron_aquila.kernels.dispatch.why_refused", lambda op, kernel, **_: tried.append((op, kernel))
    )
    kernels = choose_kernels(CPU, torch.float32, forced=dict.fromkeys(OPS, "compiled"))
    assert [(op, kernel) for op, kernel in tried if op in OPS] == [(op, IMPLEMENTATIONS[op]["compiled"]) for op in OPS]
    assert {kernels.reasons[op] for op in OPS} == {"compiled: asked for"}


def test_a_break_of_the_graph_is_an_error() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        return x + x.sum().item() if x.sum() > 0 else x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(breaks)(torch.ones(3))


def test_more_shapes_than_torch_will_compile_are_an_error() -> None:
    kernel = compiled(swiglu_reference)
    with torch._dynamo.config.patch(recompile_limit=2):
        assert [kernel(torch.ones(rows, 4)).shape for rows in (2, 3)] == [(2, 2), (3, 2)]
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            kernel(torch.ones(4, 4))


def gradients(kernels: Kernels, dtype: torch.dtype, recompute: RecomputePlan = KEEP_ALL) -> dict[str, torch.Tensor]:
    """Losses and gradients of a whole model, by name."""
    placement = Placement(tp=ParallelContext.single().tp, sequence_parallel=False, dtype=dtype, device=CPU)
    stage = AquilaStage(SHAPE, plan_stages(SHAPE, 1), 0, placement=placement, kernels=kernels, recompute=recompute)
    initialize_(stage.param_infos(), seed=3)
    loss_SB = stage(None, sample_batch(SHAPE, range(2), seed=5))
    loss_SB.sum().backward()
    return {"loss": loss_SB.detach(), **{name: weight.grad for name, weight in stage.named_parameters()}}


def test_a_model_of_them_is_the_model_with_and_without_recomputation() -> None:
    plain = choose_kernels(CPU, torch.float64, forced={"attention": "reference"})
    kernels = replace(plain, **{op: fresh(op) for op in OPS})
    selective = plan_recompute(plan_stages(SHAPE, 1), kind="selective", modules=MODULES)
    full = plan_recompute(plan_stages(SHAPE, 1), kind="full")
    expected, ours = gradients(plain, torch.float64), gradients(kernels, torch.float64)
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-12 * value.norm(), name
    for recompute in (selective, full):
        again = gradients(kernels, torch.float64, recompute)
        assert all(torch.equal(again[name], value) for name, value in ours.items())
