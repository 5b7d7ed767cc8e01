import json
import shlex
from pathlib import Path
from typing import Annotated, TypedDict

import pytest
import tyro

from megatron_aquila.config.cli import load_config, parse
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import all_settings, spell
from megatron_aquila.errors import ConfigError, format_problems


def load(text, **settings):
    return load_config(text.split(), **settings)


def failure(text, **settings):
    with pytest.raises(ConfigError) as caught:
        load(text, **settings)
    return caught.value


def test_no_arguments_are_the_defaults():
    loaded = load_config([])
    assert loaded.config == RunConfig()
    assert set(loaded.sources.values()) == {"default"}
    assert set(loaded.sources) == set(all_settings())


@pytest.mark.parametrize(
    "text", ["--tp 4", "--tp=4", "--tensor-model-parallel-size 4", "--tensor_model_parallel_size 4", "--tp 2 --tp 4"]
)
def test_spellings_of_one_flag(text):
    assert load(text).config.parallel.tensor == 4


def test_a_file_and_a_flag_are_the_same_setting(tmp_path):
    (tmp_path / "run.yaml").write_text("parallel: {tensor: 4}\n")
    assert load(f"--config {tmp_path}/run.yaml").config == load("--tp 4").config


def test_every_setting_has_a_flag_and_a_key_that_mean_the_same(tmp_path):
    flags, lines = [], []
    for setting in sorted(all_settings().values(), key=lambda setting: setting.section):
        value = setting.choices[-1] if setting.choices else setting.example
        words = shlex.split(value) if setting.is_tuple else [value]
        bare = setting.kind is bool
        flags += [setting.flags[-1].replace("--", "--no-", 1)] if bare else [setting.flags[-1], *words]
        text = f"[{', '.join(map(json.dumps, words))}]" if setting.is_tuple else "false" if bare else value
        if setting.section and f"{setting.section}:" not in lines:
            lines.append(f"{setting.section}:")
        lines.append(f"{'  ' if setting.section else ''}{setting.field}: {text}")
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    by_flag, by_key = parse(flags).given, parse(["--config", f"{tmp_path}/run.yaml"]).given
    assert set(by_flag) == set(by_key) == set(all_settings())
    assert {given.source for given in by_flag.values()} == {f"flag {word}" for word in flags if word.startswith("--")}
    for name in all_settings():
        assert spell(by_flag[name].value) == spell(by_key[name].value), name


def test_precedence_and_sources(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: aquila2-34b\nparallel:\n  tensor: 2\n  pipeline: 2\n")
    loaded = load(f"--config {path} --pipeline_model_parallel_size 1 --no-sp")
    assert (loaded.config.parallel.tensor, loaded.sources["parallel.tensor"]) == (2, f"file {path}:3")
    assert loaded.config.parallel.pipeline == 1
    assert loaded.sources["parallel.pipeline"] == "flag --pipeline-model-parallel-size"
    assert (loaded.config.parallel.sequence, loaded.sources["parallel.sequence"]) == (False, "flag --no-sp")
    assert (loaded.config.model.num_layers, loaded.sources["model.num_layers"]) == (60, "preset aquila2-34b")
    assert loaded.sources["parallel.context"] == "default"
    assert load(f"--config {path} --preset aquila2-7b").config.model.num_layers == 32


def test_none_leaves_an_optional_setting_to_be_derived(tmp_path):
    assert load("--preset aquila2-34b --rampup-batch none").config.train.rampup_batch is None
    assert load("--preset aquila2-34b --num-kv-heads none").config.model.num_kv_heads is None
    (tmp_path / "run.yaml").write_text("preset: aquila2-34b\ntrain: {rampup_batch: null}\n")
    assert load(f"--config {tmp_path}/run.yaml").config.train.rampup_batch is None
    assert "is not a whole number" in str(failure("--tp none"))


def test_values_are_typed(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {lr: 3e-4}\ndata: {path: [0.3, a, 0.7, b], split: 1}\n")
    config = load(f"--config {tmp_path}/run.yaml --load x/y").config
    assert config.optim.lr == 3e-4
    assert config.data.path == ("0.3", "a", "0.7", "b")
    assert config.data.split == "1"
    assert config.checkpoint.load == Path("x/y")


@pytest.mark.parametrize("text", ["[0.5, a, 0.5, b]", "0.5 a  0.5 b", "[0.5 a 0.5 b]"])
def test_several_values_may_be_one_text(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"data: {{path: {text}}}\n")
    assert load(f"--config {tmp_path}/run.yaml").config.data.path == ("0.5", "a", "0.5", "b")
    assert load_config(["--data-path", "0.5 a 0.5 b"]).config.data.path == ("0.5", "a", "0.5", "b")
    loaded = load_config(["--global-batch", "8", "--rampup-batch", "4 4 90"])
    assert loaded.config.train.rampup_batch == (4, 4, 90)


def test_one_text_is_one_value_where_it_holds_no_blank(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {path: d/c}\n")
    assert load(f"--config {tmp_path}/run.yaml").config.data.path == ("d/c",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("--tp x", "--tp x: is not a whole number of at least 1; tensor-parallel degree, e.g. 1"),
        ("--tp 0", "--tp 0: is not a whole number of at least 1"),
        ("--tensor-model-parallel-size 1.5", "--tensor-model-parallel-size 1.5: is not a whole number"),
        ("--zero 4", "--zero 4: is not a whole number from 1 to 3; "),
        ("--lr inf", "--lr inf: is not a finite number above 0; "),
        ("--lr nan", "--lr nan: is not a finite number above 0"),
        ("--lr -1e-4", "--lr -1e-4: is not a finite number above 0"),
        ("--lr-decay cosin", "--lr-decay cosin: is not one of cosine, linear, constant, wsd; did you mean cosine?"),
        ("--lr-decay 7", "--lr-decay 7: is not one of cosine, linear, constant, wsd; use constant, cosine, "),
        ("--rampup-batch 1 2", "--rampup-batch 1 2: is not 3 values, each a whole number of at least 1; start incr"),
        ("--stage-layers 3 x", "--stage-layers 3 x: is not a list, each a whole number of at least 0"),
        (
            "--micro-batchsize 4",
            "--micro-batchsize 4: is no setting; did you mean --micro-batch-size or --micro-batch?",
        ),
        ("--zzzz", "--zzzz: is no setting; see --help for every flag"),
        ("--zzzz=3", "--zzzz 3: is no setting"),
        ("--learning-rate 1", "--learning-rate 1: is no setting; did you mean --lr or --min-lr?"),
        ("--load-optim false", "--load-optim false: takes no value; use --load-optim or --no-load-optim"),
        ("--sequence_parallel=True", "--sequence_parallel True: takes no value; use --sp or --no-sp"),
        ("stray", "stray: belongs to no flag; settings are given as --flag value"),
        ("--preset aquila2-7", "--preset aquila2-7: no preset has this name; did you mean aquila2-7b"),
        ("--preset gpt", "--preset gpt: no preset has this name; use aquila-7b, aquila2-34b, aquila2-70b, "),
        ("--config absent.yaml", "--config absent.yaml: No such file or directory; give a YAML file"),
    ],
)
def test_one_bad_word_is_one_problem(text, problem):
    error = failure(text)
    assert len(error.problems) == 1
    assert problem in str(error)


def test_a_value_of_a_file_is_named_by_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("parallel:\n  tensor: true\n  pipeline: 99\ntrain: {rampup_batch: {a: 1}}\n")
    lines = str(failure(f"--config {path}")).splitlines()
    assert lines[0].startswith(f"{path}:2: parallel.tensor true: is not a whole number")
    assert lines[1].startswith(f"{path}:4: train.rampup_batch")
    assert lines[2].startswith(f"{path}:3: parallel.pipeline 99: 32 layers cannot fill 99 stages")


def test_all_problems_come_at_once(tmp_path):
    (tmp_path / "run.yaml").write_text("modle: {seq_len: 3}\n")
    text = "--tp 3 --pp 7 --lr abc --qk-layernorm --micro-btch 4 --attention-dropout 0.1 --cp 2"
    error = failure(f"--config {tmp_path}/run.yaml {text}", world_size=8)
    flags = [problem.flag for problem in error.problems]
    assert flags == [
        "--micro-btch",
        f"{tmp_path}/run.yaml:1",
        "--lr",
        "--qk-layernorm",
        "--attention-dropout",
        "--tp",
        "--tp 3 --cp 2 --pp 7",
    ]
    shown = format_problems(error).splitlines()
    assert shown[0] == "7 settings cannot run:"
    assert all(line.startswith("  ") for line in shown[1:])
    assert format_problems(failure("--qk-layernorm")).splitlines()[0] == "1 setting cannot run:"


def test_a_setting_that_cannot_be_typed_raises_no_further_problems():
    # global_batch has no value here: nothing is said about how it divides.
    [problem] = failure("--gbs 1o24 --mbs 4", world_size=4).problems
    assert problem.flag == "--gbs"


class Options(TypedDict, total=False):
    """Of the command."""

    fields: Annotated[int, tyro.conf.arg(name="fields")]


def test_options_of_a_command_stand_apart():
    loaded = load_config(["--fields", "3", "--tp", "2"], options=Options)
    assert loaded.options == {"fields": 3}
    assert loaded.config.parallel.tensor == 2
    assert load_config([], options=Options).options == {}


def test_options_of_a_command_are_listed_first(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"], options=Options)
    shown = capsys.readouterr().out
    assert shown.index("--fields") < shown.index("model options")
    assert "options options" not in shown


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"], prog="aquila pretrain")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: aquila pretrain" in shown
    assert "--tp INT, --tensor-model-parallel-size INT" in shown, "our spelling first"
    assert "`" not in shown
    assert all(flag in shown for setting in all_settings().values() for flag in setting.flags)
