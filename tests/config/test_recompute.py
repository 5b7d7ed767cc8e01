"""Refusals of the settings of recomputation, word for word, and Megatron's and FlagScale's spellings."""

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.config.describe import memory_rows
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import ConfigError
from megatron_aquila.train.bubble import run_schedule
from tests.config.test_check import problems, run

MANY = {"global_batch": 8, "recompute": "full", "pipeline": 2}
LEAVE = "use e.g. 2 1, the same for all stages, or leave it out"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"recompute_method": "block"},
            "--recompute-method block: it is for --recompute full, and recompute is none; "
            "use --recompute full, or leave it out",
        ),
        (
            {"recompute": "full", "recompute_modules": ("attention",)},
            "--recompute-modules attention: it is for --recompute selective, and recompute is full; "
            "use --recompute selective, or leave it out",
        ),
        (
            {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")},
            "--recompute-modules core_attn mlp: the modules are norms swiglu attention; use attention",
        ),
        (
            {"recompute": "selective", "recompute_modules": ()},
            "--recompute-modules: the modules are norms swiglu attention; use norms swiglu attention",
        ),
        (
            {"recompute": "full", "recompute_layers": 33},
            "--recompute-layers 33: the largest stage has 32 layers; use 32 or less",
        ),
        (
            {"offload_activations": 33},
            "--offload-activations 33: the largest stage has 32 layers; use 32 or less",
        ),
        (
            {**MANY, "recompute_layers_per_stage": ("3", "1")},
            f"--recompute-layers-per-stage 3 1: it is for 3 stages, there are 2; {LEAVE}",
        ),
        (
            {**MANY, "recompute_layers_per_stage": ("2", "18")},
            f"--recompute-layers-per-stage 2 18: 18 is too high, 17 is the most; {LEAVE}",
        ),
        (
            {**MANY, "recompute_method_per_stage": ("2", "2")},
            f"--recompute-method-per-stage 2 2: 2 is too high, 1 is the most; {LEAVE}",
        ),
        (
            {**MANY, "recompute_granularity_per_stage": ("2", "on")},
            f"--recompute-granularity-per-stage 2 on: it is not made of whole numbers; {LEAVE}",
        ),
        (
            {**MANY, "recompute_granularity_per_stage": ("2, 3, 1, 4, 0",)},
            f"--recompute-granularity-per-stage 2, 3, 1, 4, 0: it is for 7 microbatches, a step has 8; {LEAVE}",
        ),
    ],
)
def test_refusals(settings, words):
    assert problems(2, **{"global_batch": 8} | settings) == [words]


def test_the_ways_out_work():
    assert problems(2, **MANY, recompute_layers_per_stage=("2", "1")) == []
    assert problems(2, **MANY, recompute_granularity_per_stage=("2, 3, 1, 5, 0",)) == []
    assert problems(None, **MANY, recompute_granularity_per_stage=("2, 3, 1, 4, 0",)) == []  # the step is not known
    assert problems(1, recompute="selective", recompute_modules=("attention",)) == []


def test_too_many_stages_are_one_problem():
    assert len(problems(pipeline=33, recompute="full", recompute_layers=32)) == 1


def test_megatrons_spellings():
    argv = "--recompute-granularity full --recompute-method block --recompute-num-layers 4 --pp 4 "
    argv += "--recompute-method-per-stage 3 0 1 1 --recompute-num-layers-per-stage 3 1 1 0"
    config = load_config(argv.split()).config
    assert check(config, None) == []
    plan = derive(config, None).recompute
    assert [len(plan.at(stage, 0).groups) for stage in range(4)] == [8, 8, 9, 0]
    micro = ["--recompute", "full", "--recompute-granularity-per-stage-micro-batch", "[1, 1, 0]"]
    assert derive(load_config(micro).config, None).recompute.at(0, 0).groups == ()
    assert load_config(["--recompute-activations"]).config.train.recompute == "selective"
    for flag, way_out in (("--distribute-saved-activations", "--sp"), ("--checkpoint-activations", "--recompute full")):
        with pytest.raises(ConfigError, match=way_out):
            load_config([flag])


def test_the_planned_memory_is_less():
    def shown(**settings):
        config = run(**settings)
        derived = derive(config, 1)
        return memory_rows(config, derived, run_schedule(config, derived))[0][1]

    assert "activations 8.1 GiB" in shown()
    assert "activations 5.7 GiB" in shown(recompute="selective")
    assert shown(recompute="full").startswith("124.7 GiB"), "when the embedding's gradient is made, no layer is left"
    assert derive(RunConfig(), 1).recompute.at(0, 0).groups == ()
