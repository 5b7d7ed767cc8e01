"""Machines with several stages a rank: gradients to the bit, validation, checkpoints."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels import dispatch
from megatron_aquila.kernels.self_check import Sizes
from megatron_aquila.train.build import build_machine, create_context, plan_work
from megatron_aquila.verify.observe import observe_layout
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import run, tiny_config

Pools = Callable[[int], WorkerPool]


def small(microbatches: int, **parallel: Any) -> RunConfig:
    """Seven layers in float32."""
    return RunConfig(
        model=ModelConfig(
            num_layers=7,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_size=48,
            vocab_size=61,
            vocab_multiple=8,
            seq_len=16,
            init_std=0.2,
        ),
        parallel=ParallelConfig(**{"data": 1, "bucket_mib": 1, **parallel}),
        train=TrainConfig(precision="fp32", device="cpu", global_batch=microbatches, train_samples=microbatches),
    )


LAYOUTS = [
    ({"pipeline": 1, "chunks": 3}, 2),
    ({"pipeline": 2, "chunks": 3}, 5),
    ({"pipeline": 2, "chunks": 2, "schedule": "gpipe", "overlap": False}, 3),
    ({"pipeline": 2, "schedule": "zb-v", "stage_layers": (0, 4, 3, 0)}, 5),
    ({"pipeline": 4, "pipeline_layout": "Et|t|t|t|t|t|t|L"}, 2),
    ({"pipeline": 2, "chunks": 2, "tensor": 2, "sequence": True}, 4),
]


@pytest.mark.parametrize(("parallel", "microbatches"), LAYOUTS)
def test_gradients_are_those_of_one_process(pool: Pools, parallel: dict[str, Any], microbatches: int) -> None:
    """Bit for bit where only the pipeline differs; the world of one is held against plain autograd elsewhere."""
    config = small(microbatches, **parallel)
    tensor = {name: parallel[name] for name in ("tensor", "sequence") if name in parallel}
    expected = observe_layout(small(microbatches, **tensor), pool(parallel.get("tensor", 1)))
    found = observe_layout(config, pool(parallel["pipeline"] * parallel.get("tensor", 1)))
    assert found.loss == expected.loss
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


def chunked(config: RunConfig, **parallel: Any) -> RunConfig:
    return replace(config, parallel=ParallelConfig(**{"bucket_mib": 1, **parallel}))


@pytest.mark.parametrize("parallel", [{"pipeline": 2, "chunks": 2}, {"pipeline": 2, "schedule": "zb-v"}])
def test_a_checkpoint_of_chunks_continues_without_them(pool: Pools, tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Trained with a batch ramp and validations, saved, and loaded by one process: every tensor and figure joins."""
    config = tiny_config(tmp_path, rampup_batch=(4, 4, 8))
    config = replace(config, model=replace(config.model, num_layers=4))
    first = pool(2).run(run, chunked(config, **parallel))[0]
    alone = replace(config, checkpoint=replace(config.checkpoint, save=tmp_path / "alone"))
    whole = pool(1).run(run, chunked(alone))[0]
    # AdamW in float64 amplifies a rounding of the gradient's norm, 1e-16, by at most lr / eps = 1e6 a step
    assert [report.loss for report in first.reports] == pytest.approx([r.loss for r in whole.reports], rel=1e-9)
    assert dict(first.validations) == pytest.approx(dict(whole.validations), rel=1e-9)

    assert config.checkpoint.save is not None
    later = replace(config.checkpoint, load=config.checkpoint.save / "step_0000004", save=tmp_path / "later")
    joined = pool(1).run(run, chunked(replace(config, checkpoint=later)))[0]
    assert [report.step for report in joined.reports] == [report.step for report in first.reports[4:]]
    ends = [(r.loss, r.grad_norm) for r in first.reports[4:]]
    assert [(r.loss, r.grad_norm) for r in joined.reports] == [pytest.approx(end, rel=1e-9) for end in ends]
    saved = CheckpointReader(config.checkpoint.save)
    assert saved.tensors.keys() == CheckpointReader(tmp_path / "alone").tensors.keys()


@pytest.mark.parametrize(
    ("parallel", "sizes", "depth"),
    [
        ({"pipeline": 4}, (1, 4, 7), 1),
        ({"pipeline": 4, "schedule": "zb-v"}, (1, 4, 7), 2),
        ({"pipeline": 4, "chunks": 2}, (1, 6, 11), 3),  # rounds of 6 and 5, two more than there are ranks
        ({"pipeline": 1, "chunks": 2}, (1, 2, 3), 1),
    ],
)
def test_every_size_of_the_ramp_has_a_program(parallel: dict[str, Any], sizes: tuple[int, ...], depth: int) -> None:
    start, second, last = sizes
    config = replace(
        small(last, **parallel),
        model=ModelConfig(num_layers=8),
        train=TrainConfig(global_batch=last, rampup_batch=(start, second - start, 100)),
    )
    derived = derive(config, parallel["pipeline"])
    work = plan_work(config, derived, 0)
    assert (tuple(work.programs), work.link_depth) == (sizes, depth)
    assert {action.stage for action in work.programs[last]} == set(derived.stages.stages_of(0))


def chosen(config: RunConfig, errs: list[tuple[int, str]]) -> tuple[str, list[str]]:
    """The last word on adamw, and the warnings, where kernels err on some rank. Collective; runs in a worker."""
    derived = derive(config, 2)
    ctx = create_context(config, derived, torch.device("cpu"))
    preferences = {
        **dispatch._preferences(ctx.device, Sizes()),
        "adamw": {"triton": "fast", "apex": "good", "own": "slow"},
    }

    def refusal(_op: str, name: str, *_: Any) -> str | None:
        return f"{name} errs" if (ctx.rank, name) in errs else None

    fakes = {"_preferences": lambda *_: preferences, "why_unfit": lambda *_: None, "_refusal": refusal}
    with mock.patch.multiple(dispatch, **fakes), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            kernels = build_machine(config, derived, ctx).kernels
        except ConfigError as error:
            return str(error), []
    why = kernels.reasons["adamw"]
    assert kernels.adamw is dispatch.IMPLEMENTATIONS["adamw"][why.split(":")[0]]
    return why, [str(one.message) for one in told if "kernels:" in str(one.message)]


@pytest.mark.parametrize("parallel", [{"data": 2}, {"pipeline": 2}], ids=str)
def test_a_kernel_that_fails_on_one_rank_runs_on_none(pool: Pools, parallel: dict[str, Any]) -> None:
    """Replicas would round differently, and who raises alone leaves the others waiting."""
    config = small(2, **parallel)
    assert pool(2).run(chosen, config, []) == [("triton: fast", [])] * 2
    good, bad = pool(2).run(chosen, config, [(1, "triton")])
    assert bad == ("apex: triton errs", ["kernels: triton errs; adamw=apex runs instead"])
    why = "adamw=triton does not run on rank 1: triton errs"
    assert good == (f"apex: {why}", [f"kernels: {why}; adamw=apex runs instead"])
    forced = replace(config, train=replace(config.train, kernels=("adamw=triton",)))
    good, bad = pool(2).run(chosen, forced, [(1, "triton")])
    assert bad[0].startswith("--kernels adamw=triton: triton errs; leave it out")
    assert good[0].startswith(f"--kernels adamw=triton: {why}; leave it out")


def test_what_comes_next_must_run_everywhere_too(pool: Pools) -> None:
    """Rank 1 would have kept its first kernel, and learns only in the second round that its next one errs."""
    (first, _), (second, _) = pool(2).run(chosen, small(2, data=2), [(0, "triton"), (1, "apex")])
    assert first == "own: triton errs; adamw=apex does not run on rank 1: apex errs"
    assert second == "own: adamw=triton does not run on rank 0: triton errs; apex errs"
