"""FlagScale's published scripts through the command line: each flag is the preset's setting or refused with advice."""

from pathlib import Path

import pytest

from megatron_aquila.config.cli import load_config, parse, resolve
from megatron_aquila.config.megatron_flags import DIFFERENCES, MIGRATIONS, Always, Follows, Refused, Sets
from megatron_aquila.config.megatron_values import zero_level
from megatron_aquila.config.migrate import known_flags, migration_problems
from megatron_aquila.config.migration_page import migration_page
from megatron_aquila.config.presets import PRESETS
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import all_settings, flag_names, value_of
from megatron_aquila.errors import ConfigError
from tests.config.flagscale_scripts import ADDED_FLAGS, LATER, SCRIPT_7B, SCRIPT_34B, SCRIPT_70B

SCRIPTS = {"aquila2-7b-continue": SCRIPT_7B, "aquila2-34b": SCRIPT_34B, "aquila2-70b": SCRIPT_70B}
FOR_ALL = {"--embedding-weights-in-fp32"}
REFUSED = {
    "aquila2-7b-continue": {"--rotary-interleaved-patch"},
    "aquila2-34b": {"--make-vocab-size-divisible-by"},
    "aquila2-70b": {"--make-vocab-size-divisible-by"},
}
# What a script says of the machine and the files is no part of a recipe.
PLACES = {"save", "load", "path", "vocab_file", "merge_file", "special_tokens_file", "tensorboard_dir", "wandb_dir"}


def flags_of(script):
    """The script as one list a flag: the flag and its values."""
    words = []
    for word in script:
        words.append([word]) if word.startswith("--") else words[-1].append(word)
    return words


def later(script):
    return [word for flag, *values in flags_of(script) for word in (*LATER.get(flag, [flag]), *values)]


def problems_of(argv):
    try:
        load_config(argv)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("form", [list, later])
@pytest.mark.parametrize("preset", SCRIPTS)
def test_a_published_script_is_the_preset_or_refused(preset, form):
    script = form(SCRIPTS[preset])
    problems = problems_of(script)
    assert {problem.flag for problem in problems} == REFUSED[preset] | FOR_ALL
    for problem in problems:
        assert problem.way_out
        if problem.flag == "--make-vocab-size-divisible-by":
            assert problem.way_out.startswith(f"use --vocab-multiple {PRESETS[preset]['model.vocab_multiple']} ")
    accepted = [flag for flag in flags_of(script) if flag[0] not in REFUSED[preset] | FOR_ALL]
    loaded = load_config([word for flag in accepted for word in flag])
    wanted = load_config(["--preset", preset]).config
    for flag, *_ in accepted:
        name = flag_names().get(flag) or getattr(MIGRATIONS.get(flag), "name", None)
        if name is None or name.rpartition(".")[2] in PLACES:
            continue
        assert value_of(loaded.config, name) == value_of(wanted, name), flag
    # And nothing in the preset is left out: with the refused flags replaced, the script is the preset.
    replaced = {"model.vocab_multiple", "train.precision"}
    for name in PRESETS[preset]:
        if name not in replaced and name not in ("data.split",):
            assert value_of(loaded.config, name) == value_of(wanted, name), name


def test_every_flag_that_flagscale_adds_is_known():
    assert set(ADDED_FLAGS) <= known_flags()


def test_no_flag_has_two_meanings():
    assert not set(MIGRATIONS) & set(flag_names())
    assert all(m.name in all_settings() for m in MIGRATIONS.values() if isinstance(m, Sets | Follows))


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        ("--hetero-pipeline-stages 1 15 3 15 15 15", "use --stage-layers 15 15 15 15"),
        ("--hetero-micro-batch-sizes 2 3 4 1", "use --micro-batch-per-dp 3 3 1 1 1 1"),
        ("--hetero-micro-batch-sizes 8 2 16", "use --micro-batch-per-dp without the counts"),
        ("--hetero-device-types A800 A100", "leave it out, and start the nodes in the order of the ranks"),
        ("--hetero-mode tp", "use dp or pp or leave it out"),
        ("--num-layers-per-virtual-pipeline-stage 4", "use --chunks 8 (layers / 4 / pp)"),
        ("--hetero-pipeline-stages 1", "use --stage-layers "),
        ("--train-iters 100 --gbs 32", "use --train-samples 3200 "),
        ("--train-iters many", "use --train-samples"),
        ("--lr-warmup-fraction 0.1 --train-samples 5000", "use --lr-warmup-samples 500 "),
        ("--make-vocab-size-divisible-by", "use --vocab-multiple"),
        ("--attention-dropout 0.1", "use 0.0 or leave it out"),
        ("--attention-dropout", "use 0.0 or leave it out"),
        ("--normalization LayerNorm", "use RMSNorm or leave it out"),
        ("--max-position-embeddings 4096", "use --seq-len or leave it out"),
        ("--swiglu yes", "give the flag alone"),
        ("--bf16 true", "give the flag alone"),
        ("--transformer-impl transformer_engine", "use local or leave it out"),
        ("--no-save-optim", "leave it out: aquila convert writes"),
        ("--exit-interval 10 --gbs 4", "use --exit-samples 40 "),
        ("--ckpt-format torch_dist", "leave it out"),
        ("--ckpt-step 100 --load runs/a", "use --load runs/a/step_0000100"),
        ("--use-checkpoint-opt_param-scheduler", "leave it out"),
        (
            "--num-distributed-optimizer-instances 4 --dp 8 --cp 2 --global-batch 8",
            "use --zero-group 4 (16 ranks of dp x cp in 4 groups)",
        ),
        ("--num-distributed-optimizer-instances 4", "use --zero-group with dp x cp over the instances"),
        ("--num-distributed-optimizer-instances 1", "leave it out: one group is the default"),
        ("--ddp-bucket-size 40000000", "use --bucket-mib 152.588 "),
        ("--ckpt-step latest", "use --load FOLDER/step_N"),
        ("--finetune --load a", "use --load with --no-load-optim"),
    ],
)
def test_refusals_say_what_to_do(argv, advice):
    [problem] = problems_of(argv.split())
    assert problem.flag == argv.split()[0].replace("_", "-")
    assert problem.way_out.startswith(advice)


@pytest.mark.parametrize(
    "argv",
    [
        "--attention-dropout 0",
        "--max_position_embeddings 2048",
        "--normalization=RMSNorm",
        "--swiglu --no-load-rng",
        "--use-mcore-models --transformer-impl local --distributed-backend nccl --no-masked-softmax-fusion",
        "--hetero-mode dp",
        "--position-embedding-type rope --attention-softmax-in-fp32 --overlap-grad-reduce --overlap-param-gather",
        "--no-save-rng --log-throughput --timing-log-level 0 --exit-signal-handler --no-bias-swiglu-fusion",
    ],
)
def test_accepted_spellings(argv):
    assert load_config(argv.split()).config == RunConfig()


def test_precision_flags_set_the_precision_and_may_not_contradict_it():
    loaded = load_config(["--fp32"])
    assert (loaded.config.train.precision, loaded.sources["train.precision"]) == ("fp32", "flag --fp32")
    assert load_config(["--bf16", "--precision", "bf16"]).config.train.precision == "bf16"
    [problem] = problems_of(["--bf16", "--precision", "fp32"])
    assert str(problem) == "--bf16: contradicts --precision fp32; give one of them"
    assert load_config(["--fp16"]).config.train.precision == "fp16"
    [problem] = problems_of(["--bf16", "--fp16"])
    assert "contradicts" in str(problem)


def test_what_gradients_travel_in_may_be_said_as_megatron_does():
    assert load_config(["--accumulate-allreduce-grads-in-fp32"]).config.parallel.grad_reduce == "fp32"
    assert load_config(["--grad-reduce-in-bf16"]).config.parallel.grad_reduce == "bf16"
    assert not load_config(["--no-gradient-accumulation-fusion"]).config.parallel.fuse_main_grads
    [problem] = problems_of(["--grad-reduce-in-bf16", "--accumulate-allreduce-grads-in-fp32"])
    assert "contradicts" in str(problem)


def test_a_refusal_in_a_list_is_independent_of_the_settings():
    parsed = parse(["--fp8-e4m3", "--mup", "apply"])
    assert [problem.flag for problem in migration_problems(parsed.foreign, RunConfig())] == ["--fp8-e4m3", "--mup"]
    with pytest.raises(ConfigError, match="muP is not offered"):
        resolve(parsed)


def test_the_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "from-megatron.md"
    assert page.read_text(encoding="utf-8") == migration_page(), (
        "run: aquila config from-megatron > docs/from-megatron.md"
    )


def test_differences_are_of_settings():
    assert set(DIFFERENCES) <= set(flag_names())


def test_the_page_has_every_flag():
    page = migration_page()
    assert all(f"| `{flag}` | {difference} |" in page for flag, difference in DIFFERENCES.items())
    for flag, meaning in MIGRATIONS.items():
        assert f"`{flag}" in page
        if isinstance(meaning, Refused | Always):
            assert meaning.why in page
    for setting in all_settings().values():
        assert all(f"`{flag}`" in page for flag in setting.flags)


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["no_shard"], "use --zero 1"),
        (["optim"], "use --zero 1"),
        (["optim_grads"], "use --zero 2"),
        (["optim_grads_params"], "use --zero 3"),
        (["all"], "use --zero 1, 2 or 3"),
    ],
)
def test_what_is_sharded_is_a_level(words, way_out):
    assert zero_level(words, RunConfig()) == way_out
