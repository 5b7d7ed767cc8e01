"""Refusals of ``--cuda-graph``, word for word, and Megatron's spellings."""

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.config.describe import derived_rows
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import ConfigError
from megatron_aquila.plan.stages import Bubble
from megatron_aquila.train.bubble import run_schedule
from tests.config.test_check import problems, run

LEAVE = "or leave --cuda-graph out"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu"}, "--cuda-graph: the CPU launches no kernels; leave it out, or use --device cuda"),
        ({"pipeline": 2}, f"--pp 2: messages between stages are not recorded; use 1, {LEAVE}"),
        (
            {"zero": 3},
            "--zero 3: the memory of sharded gradients and weights comes and goes within a recorded step; "
            f"use 1, {LEAVE}",
        ),
        (
            {"offload_optimizer": 0.5},
            "--offload-optimizer 0.5: the host waits for each step's gradients, which a recorded one does not tell it "
            f"of; use 0, {LEAVE}",
        ),
        (
            {"offload_activations": 2},
            f"--offload-activations 2: copies to the host and back are not recorded; use 0, {LEAVE}",
        ),
        (
            {"reset_attention_mask": True, "eod_token_id": 2},
            "--reset-attention-mask: attention is launched by documents' lengths, which differ from step to step; "
            f"leave it out, {LEAVE}",
        ),
        (
            {"distributed_backend": "gloo"},
            "--distributed-backend gloo: what goes through the host's memory is not recorded; use nccl, " + LEAVE,
        ),
        (
            {"position_embedding": "alibi"},
            "--position-embedding alibi: each layer copies its slopes from memory of the host that is given back; "
            f"use rope, {LEAVE}",
        ),
    ],
    ids=str,
)
def test_a_step_that_cannot_be_recorded_is_refused(settings: dict[str, object], words: str) -> None:
    assert problems(**settings, cuda_graph=True) == [words]
    if "device" not in settings:
        assert problems(**settings) == []


def test_the_ways_out_work() -> None:
    for settings in ({}, {"tensor": 2}, {"context": 2, "seq_len": 2048}, {"precision": "fp8"}, {"recompute": "full"}):
        assert check(run(**settings, cuda_graph=True, global_batch=2), 2) == []


def test_megatrons_spellings() -> None:
    assert load_config(["--enable-cuda-graph"]).config.train.cuda_graph
    accepted = ["--cuda-graph-scope", "full_iteration", "--cuda-graph-warmup-steps", "3"]
    assert load_config(accepted).config == RunConfig()
    for flag, way_out in (
        ("--cuda-graph-impl local", "use --cuda-graph, or leave it out for none"),
        ("--cuda-graph-scope attn", "use full_iteration or leave it out"),
        ("--external-cuda-graph", "use --cuda-graph"),
    ):
        with pytest.raises(ConfigError, match=way_out):
            load_config(flag.split())


def test_the_first_lines_of_a_run_say_so() -> None:
    def rows(config: RunConfig) -> dict[str, str]:
        derived = derive(config, 1)
        return dict(derived_rows(config, derived, run_schedule(config, derived), bubble=Bubble(own=0.0, equal=0.0)))

    assert rows(run(cuda_graph=True))["launches"].startswith(
        "forward, backward and reduction of a step as one CUDA graph"
    )
    assert "launches" not in rows(run())
