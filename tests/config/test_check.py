"""Every problem, its exact words, and that the way out works."""

import re
from dataclasses import replace

import pytest

from megatron_aquila.config.check import RULES, check
from megatron_aquila.config.derive import derive
from megatron_aquila.config.observe import ObserveConfig
from megatron_aquila.config.optim import OptimConfig
from megatron_aquila.config.saving import CheckpointConfig
from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.config.settings import all_settings

SECTIONS = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "observe": ObserveConfig,
}


def run(**settings):
    """A run from settings by field name, defaults elsewhere."""
    found = {setting.field: setting.section for setting in all_settings().values()}
    config = RunConfig()
    for name, value in settings.items():
        config = replace(config, **{found[name]: replace(getattr(config, found[name]), **{name: value})})
    return config


def problems(world=None, **settings):
    return [str(problem) for problem in check(run(**settings), world)]


@pytest.mark.parametrize("world", [None, 1, 8])
def test_the_defaults_run(world):
    assert check(run(global_batch=8), world) == []


CASES = [
    (None, {"rope_factor": 4.0}, "--rope-factor 4.0: positions are not stretched: --rope-scaling is none; give "
     "--rope-scaling linear, ntk, yarn, llama3 or two-range, or use 1"),
    (None, {"rope_scaling": "yarn"}, "--rope-scaling yarn: --rope-factor is 1, which stretches nothing; give e.g. "
     "--rope-factor 4"),
    (None, {"rope_scaling": "linear", "rope_factor": 2.0, "rope_trained_len": 99}, "--rope-trained-len 99: "
     "--rope-scaling linear does not read it; leave it out, or use yarn, llama3 or two-range"),
    (None, {"override_rope": True}, "--override-rope: no weights are loaded that could have been trained with other "
     "positions; give --load, --resume or --init-from-hf with it, or leave it out"),
    (None, {"tensor": 3}, "--tp 3: num_heads 32, num_kv_heads 32, ffn_size 11008 and padded_vocab_size 100096 are not "
     "divisible by 3; use 1, 2, 4, 8, 16 or 32"),
    (4, {"tensor": 8}, "--tp 8: 8 ranks do not divide the world size 4; use --tp 1 --pp 1, --tp 1 --pp 2, "
     "--tp 1 --pp 4, --tp 2 --pp 1, --tp 2 --pp 2 or --tp 4 --pp 1, or start a multiple of 8 processes"),
    (None, {"tensor": 64}, "--tp 64: num_heads 32 and num_kv_heads 32 are not divisible by 64 and key/value heads are "
     "not replicated; use 1, 2, 4, 8, 16 or 32"),
    (None, {"tensor": 16, "num_kv_heads": 8}, "--tp 16: num_kv_heads 8 is not divisible by 16 and key/value heads are "
     "not replicated; use 1, 2, 4 or 8"),
    (None, {"tensor": 8, "vocab_multiple": 1, "vocab_size": 1001}, "--tp 8: padded_vocab_size 1001 is not divisible by "
     "8; use --vocab-multiple 8"),
    (None, {"context": 2, "seq_len": 510}, "--seq-len 510: ring attention over cp 2 splits it into 4 pieces; use 508 "
     "or 512"),
    (None, {"context": 2, "context_method": "ulysses", "seq_len": 511}, "--seq-len 511: ulysses attention over cp 2 "
     "splits it into 2 pieces; use 510 or 512"),
    (None, {"context": 2, "sequence": True, "tensor": 8, "seq_len": 2052}, "--seq-len 2052: ring attention over cp 2 "
     "splits it into 4 pieces and sequence parallelism splits what a rank holds over tp 8; use 2048 or 2064, or "
     "--no-sp"),
    (None, {"context": 3, "context_method": "ulysses", "seq_len": 2049}, "--cp 3: ulysses splits the 32 query heads of "
     "a tensor rank, which 3 does not divide; use 2, or --cp-method ring, which splits no heads"),
    (5, {"context": 2, "global_batch": 5}, "--cp 2: 2 ranks do not divide the world size 5; use --tp 1 --pp 1 --cp 1 "
     "or --tp 1 --pp 5 --cp 1, or start a multiple of 2 processes"),
    (None, {"pipeline": 33}, "--pp 33: 32 layers cannot fill 33 stages; use 1 to 32"),
    (None, {"pipeline": 2, "stage_layers": (32,)}, "--stage-layers 32: pp is 2, not 1; leave it out "
     "for a balanced split"),
    (None, {"pipeline": 2, "stage_layers": (8, 8, 8, 8)}, "--stage-layers 8 8 8 8: pp is 2, not 4; use --chunks 2"),
    (None, {"pipeline": 2, "chunks": 2, "stage_layers": (32,)}, "--stage-layers 32: pp 2 x chunks 2 is 4, not 1; leave "
     "it out for a balanced split"),
    (None, {"pipeline": 4, "stage_layers": (16, 0, 16, 0)}, "--stage-layers 16 0 16 0: stage 1 of 4 holds nothing; "
     "leave it out for a balanced split"),
    (None, {"pipeline": 2, "chunks": 3, "schedule": "zb-v"}, "--chunks 3: --schedule zb-v has 2 a rank; use 2, or "
     "--schedule 1f1b, which takes any number"),
    (None, {"chunks": 2, "schedule": "zb-h1"}, "--chunks 2: --schedule zb-h1 has 1 a rank; use 1, or --schedule 1f1b, "
     "which takes any number"),
    (None, {"pipeline": 20, "schedule": "zb-v"}, "--pp 20 --chunks 2: 32 layers cannot fill 40 stages; use 1 to 16 for "
     "--pp"),
    (None, {"pipeline": 4, "chunks": 9}, "--pp 4 --chunks 9: 32 layers cannot fill 36 stages; use 1 to 8 for --chunks"),
    (None, {"pipeline": 64, "chunks": 2}, "--pp 64 --chunks 2: 32 layers cannot fill 128 stages; use 1 to 16 for --pp"),
    (None, {"num_layers": 1, "schedule": "zb-v"}, "--pp 1 --chunks 2: 1 layers cannot fill 2 stages; use "
     "--schedule 1f1b"),
    (None, {"pipeline": 2, "stage_layers": (0, 32), "pipeline_layout": "E|t*32L"}, "--pipeline-layout E|t*32L: "
     "--stage-layers 0 32 says it too; give one of them"),
    (None, {"pipeline": 2, "pipeline_layout": "Et*32|m|L"}, "--pipeline-layout Et*32|m|L: multi-token prediction, its "
     "m, is not offered; leave it out for a balanced split"),
    (None, {"pipeline": 2, "pipeline_layout": "Et*15|t*16L"}, "--pipeline-layout Et*15|t*16L: they add up to 31, the "
     "model has 32 layers; leave it out for a balanced split"),
    (None, {"pipeline": 2, "pipeline_layout": "E|t*32|L"}, "--pipeline-layout E|t*32|L: pp is 2, not 3; leave it out "
     "for a balanced split"),
    (None, {"pipeline": 2, "pipeline_layout": "E|t*32|L", "schedule": "zb-v"}, "--pipeline-layout E|t*32|L: pp 2 x "
     "chunks 2 is 4, not 3; leave it out for a balanced split"),
    (None, {"pipeline": 2, "stage_layers": (15, 16)}, "--stage-layers 15 16: they add up to 31, the model has 32 "
     "layers; leave it out for a balanced split"),
    (4, {"tensor": 2, "pipeline": 4}, "--tp 2 --pp 4: tp 2 x pp 4 = 8 ranks do not divide the world size 4; use "
     "--tp 1 --pp 1, --tp 1 --pp 2, --tp 1 --pp 4, --tp 2 --pp 1, --tp 2 --pp 2 or --tp 4 --pp 1, or start a multiple "
     "of 8 processes"),
    (8, {"tensor": 2, "data": 3, "global_batch": 4}, "--dp 3: the world size 8 leaves 4 for dp; use 4, leave it out, "
     "or start 6 processes"),
    (8, {"global_batch": 100, "micro_batch": 3}, "--global-batch 100: is not a multiple of micro_batch 3 x dp 8 = 24; "
     "use 96 or 120"),
    (None, {"global_batch": 3, "micro_batch": 4}, "--global-batch 3: is not a multiple of micro_batch 4 x dp 1 = 4; "
     "use 4"),
    (8, {"tensor": 2, "micro_batch_per_dp": (2, 1), "global_batch": 3}, "--micro-batch-per-dp 2 1: it is for 2 "
     "replicas, dp is 4; give 4 of them, or start 4 processes"),
    (None, {"data": 3, "micro_batch_per_dp": (2, 1), "global_batch": 3}, "--micro-batch-per-dp 2 1: it is for 2 "
     "replicas, dp is 3; give 3 of them, or start 2 processes"),
    (2, {"elastic": True, "micro_batch_per_dp": (2, 1), "global_batch": 6}, "--micro-batch-per-dp 2 1: an elastic run "
     "changes dp, which it fixes; leave out this, or --elastic"),
    (None, {"global_batch": 8, "micro_batch_per_dp": (2, 2, 1)}, "--global-batch 8: is not a multiple of 5, what "
     "micro_batch_per_dp adds up to; use 5 or 10"),
    (3, {"global_batch": 20, "micro_batch_per_dp": (2, 2, 1), "rampup_batch": (5, 3, 100)}, "--rampup-batch 5 3 100: "
     "start and increment are not both multiples of 5, what micro_batch_per_dp adds up to; use e.g. 5 5 100"),
    (None, {"global_batch": 8, "rampup_batch": (16, 8, 100)}, "--rampup-batch 16 8 100: it starts above global_batch "
     "8; start at 8 or less"),
    (None, {"global_batch": 16, "rampup_batch": (4, 5, 100)}, "--rampup-batch 4 5 100: from 4 in steps of 5 it does "
     "not reach global_batch 16; use an increment of 3, 4 or 6"),
    (4, {"global_batch": 16, "rampup_batch": (2, 2, 100)}, "--rampup-batch 2 2 100: start and increment are not both "
     "multiples of micro_batch 1 x dp 4 = 4; use e.g. 4 4 100"),
    (None, {"global_batch": 16, "rampup_batch": (4, 4, 200), "train_samples": 100}, "--rampup-batch 4 4 200: it lasts "
     "longer than the run of 100 samples; let it end by 100"),
    (None, {"sequence": True, "tensor": 4, "seq_len": 510}, "--seq-len 510: sequence parallelism splits it over tp 4; "
     "use 508 or 512, or --no-sp"),
    (None, {"hidden_size": 4100}, "--num-heads 32: hidden_size 4100 is not divisible by it and head_dim is not given; "
     "use 5, 10, 20, 25, 41 or 50, or give --head-dim"),
    (None, {"num_kv_heads": 5}, "--num-kv-heads 5: num_heads 32 is not divisible by it; use 1, 2, 4, 8, 16 or 32"),
    (None, {"head_dim": 65}, "--head-dim 65: rotary positions turn pairs, so a head needs an even width; use 66"),
    (None, {"min_lr": 1.0}, "--min-lr 1.0: is above the peak lr 0.0003; use 0.0003 or less"),
    (None, {"train_samples": 10, "lr_warmup_samples": 10}, "--lr-warmup-samples 10: the schedule ends after 10 samples "
     "(lr_decay_samples, by default train_samples); use less than 10"),
    (None, {"lr_decay": "wsd", "lr_decay_samples": 500}, "--lr-decay wsd: wsd needs the length of its final decay; "
     "give --lr-wsd-decay-samples, e.g. 50"),
    (None, {"lr_decay": "wsd", "train_samples": 100, "lr_warmup_samples": 20, "lr_wsd_decay_samples": 90},
     "--lr-wsd-decay-samples 90: after the warm-up only 80 samples are left; use 80 or less"),
    (None, {"precision": "fp64", "device": "cuda"}, "--precision fp64: fp64 is for proofs on the CPU; attention on "
     "CUDA has no fp64; use bf16 or fp32, or --device cpu"),
    (None, {"precision": "fp8", "hidden_size": 72, "num_heads": 4, "num_kv_heads": 1, "seq_len": 8, "micro_batch": 1},
     "--precision fp8: hidden_size 72, num_heads x head_dim / tp 72, num_kv_heads x head_dim / tp 18 and micro_batch x "
     "seq_len / cp 8 are no multiples of 16; change the sizes, or use bf16"),
    (None, {"moments_dtype": "bf16", "precision": "fp32"}, "--moments-dtype bf16: fp32 has no use for it: only bf16 "
     "weights are as narrow; use fp32, or --precision bf16"),
    (None, {"master_weights": "remainder", "precision": "fp16"}, "--master-weights remainder: fp16 has no use for it: "
     "only bf16 weights are as narrow; use fp32, or --precision bf16"),
    (None, {"master_weights": "remainder", "optimizer": "sgd"}, "--master-weights remainder: sgd is for proofs and "
     "keeps nothing narrow; use --optimizer adamw"),
    (None, {"moments_dtype": "bf16", "beta2": 0.999}, "--moments-dtype bf16: with --beta2 0.999 a moment could not "
     "shrink: a step's 0.001 of it is rounded away; use fp32, or --beta2 0.99 or less"),
    (None, {"grad_reduce": "bf16", "precision": "fp64"}, "--grad-reduce bf16: it would round the gradients of fp64 "
     "weights to 8 bits; use fp32, or --precision bf16"),
    (None, {"loss_scale": 8.0}, "--loss-scale 8.0: bf16 needs no loss scale; leave it out"),
    (None, {"precision": "fp16", "initial_loss_scale": 0.5}, "--initial-loss-scale 0.5: is below min_loss_scale 1.0; "
     "use 1.0 or more"),
    (None, {"load": "a", "init_from_hf": "b"}, "--init-from-hf b: --load brings weights of its own; give one of them"),
    (None, {"profile_steps": "12", "save": "a"}, "--profile-steps 12: is no range FIRST-LAST; use e.g. 11-12"),
    (None, {"profile_steps": "12-11", "save": "a"}, "--profile-steps 12-11: no step is in this range, and the first "
     "step is 1; use e.g. 11-12"),
    (None, {"profile_steps": "0-1", "log_dir": "a"}, "--profile-steps 0-1: no step is in this range, and the first "
     "step is 1; use e.g. 11-12"),
    (None, {"profile_steps": "13-16", "save": "a", "train_samples": 100, "global_batch": 8, "rampup_batch": (4, 4, 8)},
     "--profile-steps 13-16: the run has 14 steps; use 11-14"),
    (None, {"profile_steps": "1-1"}, "--profile-steps 1-1: there is no folder for the trace; give --log-dir or --save"),
    (2, {"profile_steps": "1-1", "save": "a", "global_batch": 2, "profile_ranks": (0, 2)}, "--profile-ranks 0 2: the "
     "world has 2 ranks, the first is 0; leave out 2"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "settings", "words"), CASES)
def test_each_problem_is_found_and_worded(world, settings, words):
    assert problems(world, **settings) == [words]


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline": 2, "pipeline_layout": "Et*8|(t*8|)*2t*8L"},  # two chunks a rank, as Megatron-LM counts
        {"pipeline": 4, "pipeline_layout": "Et*8|(t*8|)*2t*8L"},
        {"pipeline": 2, "pipeline_layout": "E|t*16|t*16|L", "schedule": "zb-v"},
        {"pipeline": 3, "stage_layers": (0, 32, 0)},
        {"pipeline": 4, "chunks": 8},
        {"pipeline": 1, "chunks": 32},
        {"pipeline": 16, "schedule": "zb-v"},
    ],
)
def test_stages_that_can_be(settings):
    config = run(**settings)
    assert check(config, None) == []
    stages = derive(config, None).stages
    assert (stages.num_ranks, stages.layers[-1].stop) == (config.parallel.pipeline, 32)


@pytest.mark.parametrize("tp", [3, 5, 16, 24, 64])
def test_the_degrees_that_a_message_lists_work_and_no_others(tp):
    shape = {"num_kv_heads": 8, "global_batch": 192}
    message = problems(192, tensor=tp, **shape)[0]
    listed = {int(word) for word in re.findall(r"\d+", message.partition("; use ")[2])}
    works = {tp for tp in range(1, 193) if not any("--tp" in line for line in problems(192, tensor=tp, **shape))}
    assert listed == {tp for tp in works if 192 % tp == 0} == {1, 2, 4, 8}


def test_the_layouts_that_a_message_lists_work():
    [message] = problems(24, tensor=2, pipeline=5, global_batch=24)
    layouts = re.findall(r"--tp (\d+) --pp (\d+)", message.partition("; use ")[2])
    assert len(layouts) == 6
    for tp, pp in layouts:
        assert problems(24, tensor=int(tp), pipeline=int(pp), global_batch=24) == []


def test_problems_come_together():
    found = problems(4, tensor=3, pipeline=7, context=2, seq_len=2046, micro_batch=4, global_batch=6, min_lr=1.0)
    assert [line.split(":")[0].rpartition(" ")[0] for line in found] == [
        "--tp",
        "--tp 3 --cp 2 --pp",
        "--global-batch",
        "--seq-len",
        "--min-lr",
    ]


def test_a_rule_is_left_out_when_a_setting_it_reads_has_no_value():
    config = run(tensor=3, min_lr=1.0)
    assert [p.flag for p in check(config, None, without={"parallel.tensor"})] == ["--min-lr"]
    assert [p.flag for p in check(config, None, without={"optim.lr"})] == ["--tp"]


def test_rules_read_settings_that_exist():
    for rule, reads in RULES.items():
        assert set(reads.split()) <= set(all_settings()), rule.__name__
